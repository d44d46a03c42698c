import pytest

from aiotracker.testing import ConformanceSuite
from aiotracker.testing.conformance import MakeTracker
from tests.services.dynamodb import DynamoDBService, dynalite_dynamodb, moto_dynamodb

__all__ = ["dynalite_dynamodb", "moto_dynamodb"]  # fixtures


class OnDynamoDB(ConformanceSuite):
    __test__ = False

    @pytest.fixture
    def namespace(self, service: DynamoDBService) -> str:
        return service.namespace()

    @pytest.fixture
    def make_tracker(self, service: DynamoDBService, namespace: str) -> MakeTracker:
        return lambda **options: service.tracker(namespace, **options)

    @pytest.fixture
    def store_url(self, service: DynamoDBService, namespace: str) -> str:
        return service.store_url(namespace)


class TestDynamoDBOnDynalite(OnDynamoDB):
    """Refuses without telling what is stored."""

    __test__ = True

    @pytest.fixture
    def service(self, dynalite_dynamodb: DynamoDBService) -> DynamoDBService:
        return dynalite_dynamodb


class TestDynamoDBOnMoto(OnDynamoDB):
    __test__ = True

    @pytest.fixture
    def service(self, moto_dynamodb: DynamoDBService) -> DynamoDBService:
        return moto_dynamodb
