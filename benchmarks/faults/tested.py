"""Faults that a test of tests/ makes for real already: the row runs the test.

One fault is made in one place. What tests show in seconds is not written a second time for the table.
"""

import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial

from benchmarks.faults.lab import Broken, Lab, Row
from benchmarks.timing import REPOSITORY

TESTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "not finite for good": (
        "the run stops in one line, its checkpoint finite", "engine/test_fit.py",
        ("test_too_many_such_steps_stop_the_run_with_a_good_checkpoint",),
    ),
    "terminal gone, SIGHUP ignored": (
        "goes on and ends with 0", "pretraining/test_promises.py",
        ("test_a_closed_terminal_is_a_request_to_stop_unless_ignored",),
    ),
    "two trainings into one folder": (
        "one trains, the other is told by whom; no lock outlives a kill", "core/test_lock.py",
        ("test_the_second_is_told_who_the_first_is",
         "test_a_killed_owners_lock_is_free_at_once_though_its_workers_live"),
    ),
    "6.1 checkpoints deleted": (
        "refused, nothing lost", "pretraining/test_promises.py",
        ("test_a_run_whose_checkpoints_are_gone_is_not_trained_anew",),
    ),
    "6.2 another teacher at the same path": (
        "refused by its digest, nothing changed", "pretraining/test_promises.py",
        ("test_another_teacher_at_the_same_path_is_refused",),
    ),
    "6.3 two packs into one folder": (
        "one whole pack, an honest message to the second", "data/test_silent.py",
        ("test_two_packs_into_one_folder",),
    ),
    "6.4 images replaced, same size": (
        "another fingerprint: refused on resume", "data/test_silent.py",
        ("test_content_of_the_same_size_changes_the_fingerprint",),
    ),
    "6.7 checkpoint without checksum, damaged ones": (
        "a warning before an older one is used; all damaged: no silent new start", "core/test_checkpoint.py",
        ("test_one_without_its_sidecar_is_invisible", "test_a_damaged_one_yields_to_the_one_before",
         "test_when_all_are_damaged_nothing_begins_again_in_silence", "test_a_checksum_that_is_no_text_is_damage"),
    ),
    "6.7 checkpoint of another run": (
        "refused", "core/test_run_dir.py", ("test_a_checkpoint_of_a_run_with_other_settings_is_refused",),
    ),
    "6.7 teacher's store damaged": (
        "computed again; a run stopped twice continues bit for bit", "pretraining/test_teacher_store.py",
        ("test_a_run_stopped_twice_continues_bit_for_bit", "test_numbers_that_are_not_finite_are_not_kept"),
    ),
    "6.8 links out of a run": (
        "never followed", "core/test_record.py",
        ("test_links_out_of_the_run_are_not_followed", "test_a_pipe_is_not_waited_for"),
    ),
    "6.9 another Host header, a huge header dropped on app": (
        "refused; one line in the page", "tools/test_app.py",
        ("test_a_foreign_host_name_is_refused", "test_page_upload_slider_click_download_and_nothing_from_outside"),
    ),
    "watch: another Host header, links": (
        "refused; not looked into", "tools/test_serve.py",
        ("test_other_names_are_refused", "test_a_folder_that_is_a_link_out_of_the_run_is_not_looked_into"),
    ),
    "kills inside a file's writing": (
        "the old file or the new one", "core/test_checkpoint.py",
        ("test_readers_see_the_old_file_or_the_new_one",
         "test_content_and_checksum_are_on_the_disk_before_the_name"),
    ),
    "code in a checkpoint": (
        "refused, never run", "core/test_checkpoint.py", ("test_code_in_a_checkpoint_is_refused_and_never_run",),
    ),
    "mutated images": (
        "a picture or a reason", "data/test_decode.py", ("test_mutated_bytes_give_a_picture_or_a_reason",),
    ),
    "broken images in training": (
        "named, counted, replaced; too many stop the run", "core/test_cli.py",
        ("test_broken_images_are_named_skipped_and_stop_the_run_when_too_many",),
    ),
    "a loader worker hurt": (
        "replaced; the stream is the same; always: the run stops", "data/test_loader.py",
        ("test_workers_that_die_or_hang_are_replaced", "test_workers_that_always_die_stop_the_run"),
    ),
    "attention at extreme activations": (
        "finite", "method/test_attention.py", ("test_maps_stay_finite_at_extreme_activations",),
    ),
}  # fmt: skip


def run_tests(file: str, names: tuple[str, ...], lab: Lab, _: random.Random) -> None:
    """pytest on these tests alone. Broken where one fails, is skipped or is not there."""
    words = [f"tests/{file}::{name}" for name in names]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp"]
    done = subprocess.run(
        [*pytest, str(lab.fresh() / "t"), *words],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode or "skipped" in last:
        raise Broken(f"{' '.join(words)}: {last} {done.stderr[-200:]}")


def row(name: str) -> Row:
    """Of the table."""
    promise, file, names = TESTS[name]
    trial: Callable[[Lab, random.Random], object] = partial(run_tests, file, names)
    return Row(name, promise, trial)


ROWS = [row(name) for name in TESTS]
