import pytest

from aiotracker.testing import ConformanceSuite
from aiotracker.testing.conformance import MakeTracker
from tests.services.s3 import S3Service, ceph_s3, moto_s3, prepared

__all__ = ["ceph_s3", "moto_s3"]  # fixtures


class OnS3(ConformanceSuite):
    __test__ = False

    @pytest.fixture
    def prefix(self, service: S3Service) -> str:
        return prepared(service)

    @pytest.fixture
    def make_tracker(self, service: S3Service, prefix: str) -> MakeTracker:
        return lambda **options: service.tracker(prefix, **options)

    @pytest.fixture
    def store_url(self, service: S3Service, prefix: str) -> str:
        return service.store_url(prefix)


class TestS3OnMoto(OnS3):
    __test__ = True

    @pytest.fixture
    def service(self, moto_s3: S3Service) -> S3Service:
        return moto_s3


class TestS3OnCeph(OnS3):
    __test__ = True

    @pytest.fixture
    def service(self, ceph_s3: S3Service) -> S3Service:
        return ceph_s3


class OnS3Log(ConformanceSuite):
    __test__ = False

    @pytest.fixture
    def prefix(self, service: S3Service) -> str:
        return prepared(service, "log", shards=2)

    @pytest.fixture
    def make_tracker(self, service: S3Service, prefix: str) -> MakeTracker:
        return lambda **options: service.log_tracker(prefix, **options)

    @pytest.fixture
    def store_url(self, service: S3Service, prefix: str) -> str:
        return service.log_url(prefix)


class TestS3LogOnMoto(OnS3Log):
    __test__ = True

    @pytest.fixture
    def service(self, moto_s3: S3Service) -> S3Service:
        return moto_s3


class TestS3LogOnCeph(OnS3Log):
    __test__ = True

    @pytest.fixture
    def service(self, ceph_s3: S3Service) -> S3Service:
        return ceph_s3
