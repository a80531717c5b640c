import subprocess
import sys

import pytest

from l2l_core.errors import MAX_PROBLEMS_SHOWN, ArtifactError, ConfigError, InputError, L2LError, exit_code, raise_all


def test_raises_nothing_without_problems():
    assert raise_all([]) is None


def test_single_problem_is_the_whole_message():
    with pytest.raises(InputError) as caught:
        raise_all(["pairs.jsonl: row 3: sentence is empty"])
    assert str(caught.value) == "pairs.jsonl: row 3: sentence is empty"


def test_lists_several_problems_in_order_with_their_count():
    with pytest.raises(ConfigError) as caught:
        raise_all(["first", "second", "third"], ConfigError)
    assert str(caught.value) == "3 problems:\n  first\n  second\n  third"


@pytest.mark.parametrize("more", [0, 1, 1000])
def test_truncates_and_counts_many_problems(more):
    problems = [f"row {number}" for number in range(MAX_PROBLEMS_SHOWN + more)]
    with pytest.raises(InputError) as caught:
        raise_all(problems)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{len(problems)} problems:"
    assert [line.strip() for line in lines[1 : MAX_PROBLEMS_SHOWN + 1]] == problems[:MAX_PROBLEMS_SHOWN]
    assert lines[MAX_PROBLEMS_SHOWN + 1 :] == ([f"  ... and {more} more"] if more else [])


@pytest.mark.parametrize("kind", [L2LError, ConfigError, InputError, ArtifactError])
def test_user_errors_exit_with_code_2_and_their_message(kind, capsys):
    def main() -> None:
        raise kind("params.yaml: what is wrong")

    assert exit_code(main) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: params.yaml: what is wrong\n")


def test_success_exits_with_code_0_and_prints_nothing(capsys):
    assert exit_code(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


def test_program_errors_are_not_reported_as_user_errors():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: print(1 // 0))


@pytest.mark.parametrize(("body", "code"), [("print('done')", 0), ("raise L2LError('no photo')", 2)])
def test_a_stage_ends_with_its_exit_code_and_all_output(body, code):
    text = f"if True:\n from l2l_core.errors import L2LError, run_stage\n def main():\n  {body}\n run_stage(main)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    shown = ("done\n", "") if code == 0 else ("", "error: no photo\n")
    assert (done.returncode, done.stdout, done.stderr) == (code, *shown)
