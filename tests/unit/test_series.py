"""What names of checkpoints and lists of models and revisions mean."""

from pathlib import Path

import pytest

from transect.errors import InputError
from transect.series import series_of
from transect.view.checkpoints import checkpoints, home, last, step_of


def _model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def _run(folder: Path, *names: str) -> str:
    for name in names:
        _model(folder / name)
    return str(folder)


STEPS = {
    "step1000": 1000,
    "step-1000": 1000,
    "step_1000": 1000,
    "Step=12": 12,
    "checkpoint-500": 500,
    "0005": 5,
    "iter_0001000": 1000,
    "global_step7": 7,
    "stage1-step1000-tokens4B": 1000,
    "step0": 0,
    "checkpoint-500-merged": 500,
    None: None,
    "main": None,
    "v2": None,
    "epoch-3": None,
    "step5k": None,
    "step-1.5": None,
    "step_1_000": None,
    "step-5-checkpoint-6": None,
    "footstep-5": None,
    "7" * 40: None,
    "pkg==1.0.2 sha256:0123": None,
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_that_names_tell(name: str | None):
    assert step_of(name) == STEPS[name]


def test_checkpoints_stand_in_order_of_their_steps_and_others_behind(tmp_path: Path):
    _run(tmp_path, "step-10", "0002", "checkpoint-500", "model-10", "model-9", "best")
    (tmp_path / "step-11").mkdir()
    found = checkpoints(tmp_path)
    assert list(found) == ["0002", "step-10", "checkpoint-500", "best", "model-9", "model-10"]
    assert last(found) == "checkpoint-500"
    assert last({name: tmp_path for name in ("model-9", "model-10")}) == "model-10"
    _run(tmp_path / "checkpoints", "step-3")
    assert list(checkpoints(tmp_path)) == ["step-3"]
    assert checkpoints(tmp_path / "absent") == {}


def test_a_checkpoint_is_at_home_in_the_folder_that_holds_it(tmp_path: Path):
    assert home(tmp_path / "run" / "checkpoint-5") == (tmp_path / "run", "checkpoint-5")
    assert home(tmp_path / "run" / "checkpoints" / "5") == (tmp_path / "run", "5")
    assert home(tmp_path / "run" / "best") == (tmp_path / "run" / "best", None)
    assert home(Path("/step5")) == (Path("/step5"), None)


def _told(models: list[str], revisions: list[str]) -> list[tuple]:
    return [(m.model, m.label, m.step, m.folder) for m in series_of(models, revisions).members]


def test_a_folder_of_checkpoints_means_all_of_them_in_order(tmp_path: Path):
    run = _run(tmp_path / "run", "checkpoint-1000", "checkpoint-500", "final")
    (tmp_path / "run" / "latest").symlink_to("checkpoint-1000")
    expected = [
        ("run", "checkpoint-500", 500, "checkpoint-500"),
        ("run", "checkpoint-1000", 1000, "checkpoint-1000"),
        ("run", "final", None, "final"),
    ]
    assert _told([run], []) == _told([run], ["all"]) == expected
    assert _told([run], ["final", "checkpoint-500"]) == [expected[0], expected[2]]
    assert _told([f"{run}/checkpoint-1000", f"{run}/checkpoint-500"], []) == expected[:2]
    assert series_of([run], ["latest"]).members[0].label == "latest"


def test_a_folder_with_one_checkpoint_is_a_series_that_may_grow(tmp_path: Path):
    run = _run(tmp_path / "run", "checkpoint-500")
    series = series_of([run])
    assert series.joint and [member.folder for member in series.members] == ["checkpoint-500"]
    assert not series_of([run], ["checkpoint-500"]).joint


def test_a_run_folder_means_its_last_checkpoint_and_all_means_all(tmp_path: Path):
    run = _run(tmp_path / "run" / "checkpoints", "step-9", "step-10")[: -len("/checkpoints")]
    (member,) = series_of([run]).members
    assert (member.model, member.label, member.step, member.revision) == ("run", "step-10", 10, None)
    both = [("run", "step-9", 9, "step-9"), ("run", "step-10", 10, "step-10")]
    assert _told([run], ["all"]) == both
    assert _told([f"{run}/checkpoints"], []) == both


def test_a_model_beside_its_checkpoints_is_measured_unless_these_are_named(tmp_path: Path):
    run = str(_model(tmp_path / "run"))
    _run(tmp_path / "run", "checkpoint-5", "checkpoint-40")
    assert [(m.model, m.label) for m in series_of([run]).members] == [("run", None)]
    assert [m.step for m in series_of([run], ["all"]).members] == [5, 40]
    assert _told([run, f"{run}/checkpoint-5"], []) == [
        ("run", "checkpoint-5", 5, "checkpoint-5"),
        ("run", None, None, "model"),
    ]


def test_several_models_have_names_and_folders_of_their_own(tmp_path: Path):
    a, b = (str(_model(tmp_path / name / "net")) for name in ("a", "b"))
    run = _run(tmp_path / "run", "step1", "step2")
    assert _told([a, b, "org/net", run], []) == [
        ("a/net", None, None, "a_net"),
        ("b/net", None, None, "b_net"),
        ("org/net", None, None, "org_net"),
        ("run", "step1", 1, "run/step1"),
        ("run", "step2", 2, "run/step2"),
    ]
    assert _told(["a_net", "a/net"], []) == [("a_net", None, None, "a_net"), ("a/net", None, None, "a_net-2")]


def test_every_revision_is_one_of_every_model():
    assert _told(["org/small", "org/large"], ["step5", "step4"]) == [
        ("org/small", "step4", 4, "org_small/step4"),
        ("org/small", "step5", 5, "org_small/step5"),
        ("org/large", "step4", 4, "org_large/step4"),
        ("org/large", "step5", 5, "org_large/step5"),
    ]
    (one,) = series_of(["org/small"], ["step5"]).members
    assert (one.source, one.revision, one.folder) == ("org/small", "step5", "")


def test_what_is_not_there_or_given_twice_is_refused(tmp_path: Path):
    single = str(_model(tmp_path / "single"))
    run = _run(tmp_path / "run", "step1", "step2")
    (tmp_path / "empty").mkdir()
    wrong = [
        ([single, f"{tmp_path}/absent"], [], "no model folder"),
        ([f"{tmp_path}/absent"], ["all"], "no model folder"),
        ([run, str(tmp_path / "run" / ".." / "run")], [], "run at step1 is given twice"),
        ([single, single], [], "single is given twice"),
        ([run], ["step1", "step1"], "run at step1 is given twice"),
        ([run, f"{run}/step1"], [], "step1 is given twice"),
        ([run], ["step3"], "has no checkpoint 'step3'; it has step1, step2"),
        ([single], ["step3"], "single model, so it has no revision 'step3'"),
        ([single], ["all"], "holds no checkpoints"),
        (["org/net"], ["all"], "name the revisions of org/net"),
        ([str(tmp_path / "empty")], [], "not a model folder"),
    ]
    for models, revisions, words in wrong:
        with pytest.raises(InputError, match=words) as caught:
            series_of(models, revisions)
        assert "\n" not in str(caught.value)
