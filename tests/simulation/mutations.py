"""A log with one of its remedies taken out: the simulation must miss each, or a test that is named here.

A remedy is taken out by an edit of its source, in a copy of it; see `taking_out.py`.
"""

from typing import Final, NamedTuple

__all__ = ["MUTATIONS", "SIMULATION", "Mutation"]

SIMULATION: Final = "simulation"  # `python -m tests.simulation`
FILES: Final = "backends/_log_files.py"
LOG: Final = "backends/_log.py"
SYSTEM: Final = "backends/_filesystem.py"
COMMIT: Final = "backends/_commit.py"
SHARD: Final = "backends/_shard.py"
ARCHIVE: Final = "backends/_archive.py"
FILE: Final = "backends/file.py"
TEST_FILE: Final = "tests/backends/test_file.py::test_"
TEST_LOCK: Final = "tests/backends/test_file_lock.py::test_"
TEST_COMPACTION: Final = "tests/backends/test_file_compaction.py::test_"
TEST_SYSTEM: Final = "tests/backends/test_filesystem.py::test_"
TEST_COMMIT: Final = "tests/backends/test_commit.py::test_"
TEST_SYNCS: Final = "tests/backends/test_file_syncs.py::test_"
TEST_S3: Final = "tests/backends/test_s3_log_protocol.py::Test"
TEST_S3_NAMES: Final = "tests/backends/test_s3_log_names.py::test_"
TEST_LOG: Final = "tests/backends/test_log.py::test_"


class Mutation(NamedTuple):
    """One remedy that is taken out.

    Attributes:
        what: The engine does then.
        path: Of the source, in `aiotracker`.
        edits: What stands there once, and what in its place.
        found_by: The test that fails then.
    """

    what: str
    path: str
    edits: dict[str, str]
    found_by: str


ONE_COMMIT: Final = (
    Mutation(
        "a commit runs on a thread of the event loop's",
        COMMIT,
        {"        self._thread.start()": "        self._loop.run_in_executor(None, self._run)"},
        TEST_LOCK + "commits_go_on_while_all_threads_of_the_event_loop_are_busy",
    ),
    Mutation(
        "a stuck commit keeps its process from ending",
        COMMIT,
        {"name=name, daemon=True": "name=name"},
        TEST_LOCK + "a_process_whose_commit_is_stuck_can_end",
    ),
    Mutation("a commit takes no lock", FILES, {"disk.lock(self._lock_fd)": "pass"}, SIMULATION),
    Mutation(
        "the lock is polled",
        SYSTEM,
        {"fcntl.flock(fd, fcntl.LOCK_EX)": "while not self.try_lock(fd):\n            time.sleep(0.05)"},
        TEST_LOCK + "who_waits_for_the_lock_stands_in_the_systems_queue_and_does_not_ask_again_and_again",
    ),
    Mutation(
        "there is no lock in memory",
        FILES,
        {"with self._mutex:": "with contextlib.nullcontext():"},
        TEST_LOCK + "two_trackers_of_one_process_take_turns_where_the_systems_lock_lets_a_process_in_twice",
    ),
    Mutation(
        "what others wrote is not read under the lock",
        FILES,
        {"                    self._refresh(locked=True)": "                    pass"},
        SIMULATION,
    ),
    Mutation(
        "the lock is kept",
        FILES,
        {"                disk.unlock(self._lock_fd)": "                pass"},
        TEST_LOCK + "who_waits_for_the_lock_stands_in_the_systems_queue_and_does_not_ask_again_and_again",
    ),
    Mutation(
        "nothing is synced",
        FILES,
        {"try:\n            self.disk.sync(self._fd)\n        except": "try:\n            pass\n        except"},
        SIMULATION,
    ),
    Mutation(
        "a sync leaves bytes in the disk's cache",
        SYSTEM,
        {"if full_sync is not None:": "if False:"},
        TEST_SYSTEM + "where_a_sync_leaves_bytes_in_the_disks_cache_that_is_flushed_too",
    ),
)

EACH_OPERATION: Final = (
    Mutation(
        "one operation that fails lets all others fail",
        LOG,
        {"want.error = exc\n                continue": "raise"},
        TEST_LOG + "one_failing_transition_fails_alone",
    ),
    Mutation(
        "a record may be of any size",
        LOG,
        {"if len(line) > limit:": "if False:"},
        TEST_LOG + "one_failing_transition_fails_alone",
    ),
    Mutation(
        "an operation does not see those before it in its commit",
        LOG,
        {"if task_id in changes:": "if False:"},
        TEST_LOG + "nothing_is_changed_before_a_batch_is_applied",
    ),
    Mutation(
        "the index changes before the sync",
        FILES,
        {
            "        self.index.apply(batch)\n        taken": "        taken",
            "        if batch.data:\n            self._append": "        self.index.apply(batch)\n"
            "        if batch.data:\n            self._append",
        },
        SIMULATION,
    ),
    Mutation(
        "the offset moves before the sync",
        FILES,
        {"= self._offset, False\n": "= self._offset, False\n        self._offset += len(data)\n"},
        TEST_SYNCS + "who_failed_to_write_goes_on_behind_what_others_wrote_meanwhile",
    ),
    Mutation(
        "a refusal is told although its commit failed",
        COMMIT,
        {"for item in items:\n                # One": "for item in items[:1]:\n                # One"},
        TEST_LOCK + "a_refusal_is_not_told_where_the_commit_that_it_stands_on_failed",
    ),
)

FAILED_WRITES: Final = (
    Mutation(
        "a short write counts",
        SYSTEM,
        {"    while view:\n": "    if view:\n"},
        TEST_SYSTEM + "a_write_of_which_the_system_takes_a_part_at_a_time_is_written_to_its_end",
    ),
    Mutation(
        "a failed write counts",
        FILES,
        {"            self._take_back(start)\n            raise": "            self._take_back(start)"},
        SIMULATION,
    ),
    Mutation(
        "a failed write is not taken back",
        FILES,
        {"            self._take_back(start)\n            raise": "            raise"},
        TEST_FILE + "a_short_write_fails_its_batch_and_leaves_no_trace",
    ),
    Mutation(
        "what was taken back is not synced",
        FILES,
        {
            "            if self._fsync:\n                self.disk.sync(self._fd)\n        except OSError as exc:\n"
            '            self._break(f"a write': '        except OSError as exc:\n            self._break(f"a write'
        },
        TEST_SYNCS + "that_a_write_failed_is_told_after_it_was_taken_back_and_that_was_synced",
    ),
    Mutation(
        "the tracker goes on when a write could not be taken back",
        FILES,
        {'self._break(f"a write failed, and could not be taken back: {exc}")': "pass"},
        TEST_FILE + "a_write_that_cannot_be_taken_back_stops_the_tracker_until_it_is_reopened",
    ),
    Mutation(
        "the tracker goes on after a failed sync",
        FILES,
        {'            self._break(f"the log could not be synced: {exc}")\n': ""},
        SIMULATION,
    ),
)

FORMAT: Final = (
    Mutation(
        "lines have no sum",
        LOG,
        {'return line[-_TAIL:] == b\',"crc":"%08x"}\\n\' % crc32(line[:-_TAIL])': "return line.startswith(b'{')"},
        TEST_LOG + "a_changed_byte_before_the_last_commit_is_damage_and_is_never_read_as_something_else",
    ),
    Mutation(
        "marks have no sum",
        LOG,
        {'crc32(b"".join([line[-11:-3] for line in lines]) + body)': "crc32(body)"},
        TEST_LOG + "a_commit_does_not_count_with_a_whole_line_that_is_not_its_own",
    ),
    Mutation(
        "neither lines nor marks have a sum",
        LOG,
        {
            'return line[-_TAIL:] == b\',"crc":"%08x"}\\n\' % crc32(line[:-_TAIL])': "return line.startswith(b'{')",
            'crc32(b"".join([line[-11:-3] for line in lines]) + body)': "crc32(body)",
        },
        SIMULATION,
    ),
    Mutation(
        "lines count without their mark",
        LOG,
        {
            "        lines.append(line)\n        position = newline\n    parsed": "        if index is not None:\n"
            "            index.apply_line(line)\n        position = commit = newline\n    parsed",
            "if line != _mark(lines):": "if False:",
        },
        SIMULATION,
    ),
    Mutation(
        "a torn tail is not cut",
        FILES,
        {"self.disk.truncate(self._fd, parsed.end)": "return seen"},
        TEST_FILE + "a_torn_commit_is_cut_by_the_next_writer_and_not_seen_by_readers",
    ),
    Mutation(
        "damage is taken for a torn tail",
        LOG,
        {"if commit < size and (later": "if False and (later"},
        TEST_FILE + "damage_is_refused_with_its_place_and_nothing_is_cut",
    ),
    Mutation(
        "the place of a damage is not told",
        FILES,
        {"parsed.damage.offset,": "0,"},
        TEST_FILE + "damage_is_refused_with_its_place_and_nothing_is_cut",
    ),
    Mutation(
        "what was read without the lock is not looked at again under it",
        FILES,
        {"if locked and self._tail:": "if False:"},
        SIMULATION,
    ),
)

DIRTY_READS: Final = (
    Mutation(
        "what others wrote is told before it is synced",
        FILES,
        {"if self._foreign and self._fsync:": "if False:"},
        SIMULATION,
    ),
    Mutation(
        "what a killed writer left is not synced first",
        FILES,
        {"if not self._is_clean and self._fsync:": "if False:"},
        TEST_SYNCS + "what_a_killed_writer_left_is_synced_before_anything_is_written_behind_it",
    ),
    Mutation(
        "who is killed in its commit leaves no word of that",
        FILES,
        {"time.time(), UNCLEAN)": 'time.time(), b" ")'},
        TEST_SYNCS + "a_process_that_is_killed_in_its_commit_leaves_word_of_that",
    ),
)

COMPACTION: Final = (
    Mutation(
        "a new log is written under the lock",
        FILES,
        {"            self._write()\n": "            with self._files._locked():\n                self._write()\n"},
        TEST_COMPACTION + "others_commit_while_a_new_log_is_written",
    ),
    Mutation(
        "what came meanwhile is not copied",
        FILES,
        {"            compaction.copy(self._offset)\n": ""},
        SIMULATION,
    ),
    Mutation(
        "a new log is not synced",
        FILES,
        {
            "            self.disk.sync(compaction.fd)\n": "",
            "        self._entries = []\n        disk.sync(self.fd)\n": "",
        },
        SIMULATION,
    ),
    Mutation(
        "the name of a new log is not synced",
        FILES,
        {"self._path / name)\n            self.disk.sync_folder(self._path)": "self._path / name)"},
        SIMULATION,
    ),
    Mutation("the old log is not sealed", FILES, {"line = seal(name, compaction.size)": 'line = b""'}, SIMULATION),
    Mutation(
        "a seal is not synced",
        FILES,
        {"line, self._offset)\n                self.disk.sync(self._fd)": "line, self._offset)"},
        SIMULATION,
    ),
    Mutation(
        "a seal that others wrote is followed before it is synced",
        FILES,
        {"self._sync_or_break()  # who": "pass  # who"},
        SIMULATION,
    ),
    Mutation(
        "who follows reads the new log from its beginning",
        FILES,
        {"parsed.sealed[1])\n                except": "0)\n                except"},
        TEST_COMPACTION + "who_follows_into_a_new_log_reads_there_only_what_is_new",
    ),
    Mutation(
        "who opens the store starts at the highest number",
        FILES,
        {"self._open_log(numbers[0], 0)": "self._open_log(numbers[-1], 0)"},
        TEST_FILE + "a_new_log_that_was_never_sealed_in_is_not_read",
    ),
    Mutation(
        "a new log holds what was taken back",
        FILES,
        {"(compaction.number, compaction.reloads)": "(compaction.number, self._reloads)"},
        TEST_COMPACTION + "a_new_log_is_dropped_where_what_it_holds_was_taken_back",
    ),
    Mutation(
        "a log that was compacted meanwhile is compacted again",
        FILES,
        {"(self._number, self": "(compaction.number, self"},
        TEST_COMPACTION + "a_new_log_is_dropped_where_another_process_was_faster",
    ),
    Mutation(
        "nobody looks whether the log is still there",
        FILES,
        {"if links == 0 or (self": "if (self"},
        TEST_FILE + "a_store_that_is_removed_under_us_is_said",
    ),
    Mutation(
        "nobody looks whether the lock is still there",
        FILES,
        {"disk.size_and_links(self._lock_fd)[1] == 0": "False"},
        TEST_FILE + "a_lock_file_that_is_removed_is_said",
    ),
)

BOUNDS: Final = (
    Mutation(
        "a commit takes any number of operations",
        COMMIT,
        {"room = MAX_ITEMS": "room = 1_000_000"},
        TEST_COMMIT + "no_commit_takes_more_than_5_000_operations",
    ),
    Mutation(
        "a commit takes any number of bytes",
        LOG,
        {"if size > MAX_COMMIT_BYTES:": "if False:"},
        TEST_LOG + "a_batch_takes_no_more_than_fits_into_a_commit",
    ),
    Mutation(
        "what a commit did not take comes last",
        COMMIT,
        {"self._normal.extendleft(reversed(batch[taken:]))": "self._normal.extend(batch[taken:])"},
        TEST_COMMIT + "what_a_commit_did_not_take_is_the_first_of_the_next",
    ),
    Mutation(
        "renewals are not urgent",
        FILE,
        {", urgent=type(want.transition) is Renew": ""},
        TEST_LOCK + "a_renewal_comes_before_all_that_has_waited_longer",
    ),
    Mutation(
        "what is urgent comes last",
        COMMIT,
        {"for queue in (self._urgent, self._normal):": "for queue in (self._normal, self._urgent):"},
        TEST_LOCK + "a_renewal_comes_before_all_that_has_waited_longer",
    ),
    Mutation(
        "a waiter waits for the lock as long as it takes",
        COMMIT,
        {"self._loop.call_later(self._patience, self._watch)": "pass"},
        TEST_LOCK + "who_waits_for_a_third_of_a_lease_is_told_which_process_took_the_lock_and_when",
    ),
    Mutation(
        "a waiter waits for a whole lease",
        "tracker.py",
        {"self._patience = self.lease / 3": "self._patience = self.lease"},
        TEST_LOCK + "who_waits_for_a_third_of_a_lease_is_told_which_process_took_the_lock_and_when",
    ),
    Mutation(
        "who opens the store waits for the lock as long as it takes",
        FILE,
        {"async with asyncio.timeout(self._patience):": "async with asyncio.timeout(None):"},
        "tests/backends/test_file_faults.py::"
        "test_opening_gives_up_soon_while_somebody_keeps_the_lock_and_does_it_when_it_is_free",
    ),
    Mutation(
        "the error does not name the lock's owner",
        FILE,
        {"blame=files.blame": 'blame=lambda: "somebody has the lock"'},
        TEST_FILE + "who_waits_too_long_for_the_lock_is_told_who_has_it_and_leaves_nothing_claimed",
    ),
    Mutation(
        "who locks does not say who it is",
        FILES,
        {'b"%-20d%-43.3f%b" % (os.getpid(), time.time(), UNCLEAN)': 'b" " * (OWNER_BYTES - 1) + UNCLEAN'},
        TEST_LOCK + "who_waits_for_a_third_of_a_lease_is_told_which_process_took_the_lock_and_when",
    ),
    Mutation(
        "what nobody waits for any more is written when the lock is free",
        FILES,
        {"if self.is_abandoned():": "if False:"},
        TEST_LOCK + "what_nobody_waits_for_any_more_is_not_written_when_the_lock_is_free",
    ),
    Mutation(
        "what was cancelled while it waited is committed",
        COMMIT,
        {"return [waiting for waiting in batch if not waiting[0].done()]": "return batch"},
        TEST_LOCK + "what_was_cancelled_while_it_waited_is_not_in_the_next_commit",
    ),
    Mutation(
        "a claim whose waiter has gone is kept",
        COMMIT,
        {"undo = self._orphaned(item) if item.error is None else None": "undo = None"},
        TEST_FILE + "claims_that_land_around_the_end_of_the_loop_are_given_back",
    ),
    Mutation(
        "attempts count that were lost to a store that could not be reached",
        "running.py",
        {"        if held.unreachable:": "        if False:"},
        "tests/test_leases.py::test_attempts_that_are_lost_since_the_store_could_not_be_reached_do_not_exhaust_a_task",
    ),
)

IDENTITY: Final = (
    Mutation(
        "the format is written at each opening",
        FILES,
        {"if not disk.exists(identity):": "if True:"},
        TEST_FILE + "a_store_of_another_format_is_refused_and_not_changed",
    ),
    Mutation(
        "a newer format is written to",
        FILES,
        {'if identity.get("format") != FORMAT:': "if False:"},
        TEST_FILE + "a_store_of_another_format_is_refused_and_not_changed",
    ),
    Mutation(
        "another layout is taken for a log",
        FILES,
        {'if identity.get("layout") != "log":': "if False:", "if names and ": "if False and "},
        TEST_FILE + "a_folder_store_is_not_opened_as_a_log",
    ),
    Mutation(
        "a folder with other files is made a store",
        FILES,
        {"            self._check_not_foreign()\n": ""},
        TEST_FILE + "a_folder_with_other_files_is_not_made_a_store",
    ),
    Mutation(
        "the identity is not synced",
        FILES,
        {'"layout": "log"}) + b"\\n", 0)\n                disk.sync(fd)\n': '"layout": "log"}) + b"\\n", 0)\n'},
        SIMULATION,
    ),
    Mutation(
        "the log may be there before its identity",
        FILES,
        {"            disk.sync_folder(self._path)  # a log": "            pass  # a log"},
        SIMULATION,
    ),
    Mutation(
        "the names of a new store are not synced",
        FILES,
        {"        disk.sync_folder(self._path)\n\n    def _check_identity": "\n    def _check_identity"},
        SIMULATION,
    ),
    Mutation(
        "folders that are made are not synced",
        SYSTEM,
        {"mkdir(exist_ok=True)\n        sync_folder(folder.parent)": "mkdir(exist_ok=True)"},
        TEST_SYSTEM + "every_folder_that_is_made_is_synced_into_the_one_it_lies_in_before_the_next_is_made",
    ),
    Mutation(
        "a folder that somebody else has made is not synced",
        SYSTEM,
        {"        sync_folder(there.parent)": "        pass"},
        TEST_SYSTEM + "a_folder_that_is_there_is_synced_too_since_whoever_made_it_may_have_been_killed_before_it_could",
    ),
    Mutation(
        "network file systems are taken",
        SYSTEM,
        {"if kind in UNSAFE or ": "if "},
        TEST_FILE + "network_and_fuse_file_systems_are_refused_unless_allowed",
    ),
    Mutation(
        "FUSE is taken",
        SYSTEM,
        {' or kind == "fuse" or kind.startswith("fuse."):': ":"},
        TEST_FILE + "network_and_fuse_file_systems_are_refused_unless_allowed",
    ),
    Mutation(
        "what is refused cannot be allowed",
        SYSTEM,
        {"    if allow_unsafe:\n        return\n": ""},
        TEST_FILE + "network_and_fuse_file_systems_are_refused_unless_allowed",
    ),
)

FORKS: Final = (
    Mutation(
        "a child keeps its parent's lock",
        FILE,
        {"        files.forget()\n": ""},
        TEST_FILE + "an_idle_forked_child_does_not_keep_the_lock_of_a_killed_parent",
    ),
    Mutation(
        "a child waits for its parent's thread",
        FILE,
        {"        committer.forget()\n": ""},
        TEST_FILE + "a_forked_child_cannot_use_its_parents_tracker",
    ),
    Mutation(
        "nobody notices a fork",
        FILE,
        {"os.register_at_fork(after_in_child=_after_fork)": "pass"},
        TEST_FILE + "a_forked_child_cannot_use_its_parents_tracker",
    ),
    Mutation(
        "a child waits for a lock that its parent holds in memory",
        FILE,
        {"    forget_mutexes()\n": ""},
        TEST_LOCK + "a_child_that_was_forked_during_a_commit_can_open_the_store_for_itself",
    ),
)

LOG_ON_S3: Final = (  # beside those in `mutations_on_s3.py`
    Mutation(
        "after a lost race the transitions are not run again",
        SHARD,
        {
            "if await self._append(state, batch, now, wanted):\n                break": (
                "await self._append(state, batch, now, wanted)\n            break"
            )
        },
        TEST_S3 + "Ghosts::test_a_stalled_write_that_lands_on_a_deleted_number_does_not_count",
    ),
    Mutation(
        "what a segment says of its number and shard is not looked at",
        SHARD,
        {"if (about.segment, about.shard) != (number, self.number):": "if False:"},
        TEST_S3_NAMES + "a_segment_that_says_that_it_is_another_one_is_damage",
    ),
    Mutation(
        "the floor goes down",
        ARCHIVE,
        {"if old is not None and old.floor >= new.floor:": "if False:"},
        TEST_S3_NAMES + "a_checkpoint_that_comes_late_does_not_lower_the_floor",
    ),
    Mutation(
        "segments above the floor are deleted",
        ARCHIVE,
        {"number is not None and number <= last]": "number is not None]"},
        TEST_S3 + "Deleting::test_a_segment_is_deleted_when_the_floor_has_stood_above_it_for_an_hour",
    ),
)

MUTATIONS: Final = (
    *ONE_COMMIT,
    *EACH_OPERATION,
    *FAILED_WRITES,
    *FORMAT,
    *DIRTY_READS,
    *COMPACTION,
    *BOUNDS,
    *IDENTITY,
    *FORKS,
    *LOG_ON_S3,
)
