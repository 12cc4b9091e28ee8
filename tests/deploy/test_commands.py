"""The command lines and configs in the files of deploy/ are understood by featray, and by Ray."""

from __future__ import annotations

import re
from pathlib import Path

import deploy_files
import pytest

from featray.cli.main import make_parser
from featray.config import load
from featray.errors import ExitCode

CONFIG = deploy_files.KUBERNETES / "base" / "featray.yaml"
COMMANDS = deploy_files.read_command_lines()
EXAMPLES = deploy_files.read_command_lines_of_comments()


def check_command(words: list[str]) -> None:
    """Parse a command line, and load the config that it names with the values that it sets."""
    args = make_parser().parse_args(words)
    path = args.config.replace(deploy_files.MOUNTED_CONFIG, str(CONFIG))
    path = path if Path(path).is_absolute() else str(deploy_files.REPOSITORY / path)
    load(path, args.set)


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_every_command_parses_and_its_settings_exist(words: list[str]) -> None:
    check_command(words)


@pytest.mark.parametrize("words", EXAMPLES.values(), ids=EXAMPLES)
def test_every_example_in_a_comment_parses(words: list[str]) -> None:
    check_command(words)


def test_an_unknown_option_or_key_in_a_command_is_noticed() -> None:
    with pytest.raises(SystemExit):
        check_command(["refresh", deploy_files.MOUNTED_CONFIG, "--retries"])
    with pytest.raises(Exception, match=r"run\.actors"):
        check_command(["refresh", deploy_files.MOUNTED_CONFIG, "--set", "run.actors.num_cpu=1"])


def test_every_command_names_the_engine_that_its_surroundings_have() -> None:
    engines = {name: [word for word in words if "engine" in word] for name, words in COMMANDS.items()}
    with_ray = {name for name, found in engines.items() if found == ["run.engine=ray"]}
    assert with_ray == {"rayjob", "several_nodes"}
    assert {name for name, found in engines.items() if found == ["run.engine=inline"]} == {
        *engines
    } - with_ray


@pytest.mark.parametrize("path", deploy_files.list_files(), ids=deploy_files.name_file)
def test_every_file_opens_with_the_command_that_uses_it(path: Path) -> None:
    head = path.read_text(encoding="utf-8").splitlines()[:4]
    names = {deploy_files.name_file(path), deploy_files.name_file(path.parent), path.name}
    programs = ("docker", "kubectl", "systemctl", "sbatch", "aws", "featray", "cp")
    used = [line for line in head if any(name in line for name in names)]
    assert any(f"{program} " in line for line in used for program in programs), head


def test_the_readme_lists_every_file_or_its_folder() -> None:
    text = (deploy_files.DEPLOY / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Deploy\n")[1].split("\n## ")[0]
    linked = [deploy_files.DEPLOY / target for target in re.findall(r"\]\(([\w./-]+)\)", section)]
    folders = {path.parent for path in linked} - {deploy_files.DEPLOY}
    assert [
        path for path in deploy_files.list_files() if path not in linked and path.parent not in folders
    ] == []


def test_exit_codes_decide_what_is_tried_again() -> None:
    cron_job = deploy_files.load_manifest("cronjob/cronjob.yaml")["spec"]
    rules = cron_job["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    (final,) = [rule["onExitCodes"]["values"] for rule in rules if rule["action"] == "FailJob"]
    service = (deploy_files.DEPLOY / "systemd" / "featray.service").read_text(encoding="utf-8")
    assert final == [ExitCode.USAGE, ExitCode.TOO_MANY_FAILED]
    assert f"RestartPreventExitStatus={ExitCode.USAGE} {ExitCode.TOO_MANY_FAILED}\n" in service
    assert f"SuccessExitStatus={ExitCode.INTERRUPTED}\n" in service
    assert deploy_files.load_airflow_arguments()["skip_on_exit_code"] == ExitCode.BUSY


def test_the_attempts_of_the_cron_job_last_longer_than_the_lease_of_a_dead_run() -> None:
    from featray.output.lease import STALE_S, WATCH_S

    limit = deploy_files.load_manifest("cronjob/cronjob.yaml")["spec"]["jobTemplate"]["spec"]["backoffLimit"]
    pauses = [10 * 2**number for number in range(limit)]  # those of Kubernetes, in seconds
    assert sum(pauses) > STALE_S + WATCH_S


@pytest.mark.slow
def test_ray_has_the_command_that_starts_it_on_several_nodes() -> None:
    from ray.scripts.symmetric_run import symmetric_run

    options = {option for item in symmetric_run.params for option in item.opts}
    assert {"--address", "--min-nodes"} <= options
