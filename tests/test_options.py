"""Options: ours are checked, Inductor's pass through, what would break the contract is refused by name."""

import pytest
import torch
from devices import compiled

from bi_inductor._compat import fusion_settings
from bi_inductor.errors import OptionError
from bi_inductor.options import REQUIRED_SETTINGS, Options, parse, required_patches


def test_inductor_options_pass_through():
    ours, patches = parse(None, {"max_fusion_size": 8, "triton.cudagraphs": True})
    assert ours == Options()
    assert patches == {**fusion_settings(), "max_fusion_size": 8, "triton.cudagraphs": True}


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead", "max-autotune"])
def test_modes_are_inductors(mode):
    _, patches = parse(mode, None)
    expected = torch._inductor.list_mode_options(mode) if mode else {}
    assert patches == {**fusion_settings(), **expected}


@pytest.mark.parametrize(
    ("options", "suggestion"),
    [
        ({"batchinv.unprovn": "warn"}, "batchinv.unproven"),
        ({"max_autotun": True}, "max_autotune"),
        ({"unproven": "warn"}, "batchinv.unproven"),
    ],
)
def test_a_typo_is_answered_with_a_suggestion(options, suggestion):
    with pytest.raises(OptionError, match=f"did you mean '{suggestion}'"):
        parse(None, options)


def test_a_mode_that_does_not_exist():
    with pytest.raises(OptionError, match="did you mean 'max-autotune'"):
        parse("max_autotune", None)


def test_a_value_that_does_not_exist():
    with pytest.raises(OptionError, match="must be 'refuse' or 'warn'"):
        parse(None, {"batchinv.unproven": "ignore"})


@pytest.mark.parametrize("name", required_patches())
def test_what_would_break_the_contract_is_refused_by_name(name):
    required, reason = REQUIRED_SETTINGS[name]
    other = (not required) if isinstance(required, bool | int) else "something else"
    with pytest.raises(OptionError, match=name) as caught:
        parse(None, {name: other})
    assert reason in str(caught.value)
    parse(None, {name: required})


def test_the_user_sees_the_error_itself():
    with pytest.raises(OptionError, match="pattern_matcher"):
        compiled(torch.nn.Linear(2, 2), options={"pattern_matcher": True})(torch.ones(1, 2))
