"""Names of options: the types that mypy checks are the library's own tables; modules check them."""

import copy
import inspect
import pickle
import typing
import warnings

import pytest
import torch

import fastkd
from fastkd._ops import hints, names
from fastkd._ops.arguments import CHOICES
from fastkd.recipes import RECIPES
from fastkd.teachers import _shards
from fastkd.tokenizers import _alm_loss

FUNCTIONS = {
    "SoftmaxDivergence": fastkd.softmax_divergence,
    "LinearSoftmaxDivergence": fastkd.linear_softmax_divergence,
    "TopKDivergence": fastkd.topk_divergence,
    "ClippedDivergence": fastkd.clipped_divergence,
    "CrossEntropy": fastkd.cross_entropy,
    "AlmLoss": fastkd.alm_loss,
    "KDLoss": fastkd.softmax_divergence,
}
#: Of a call, not of a constructor.
BATCH = {"weight", "mask", "labels", "teacher_rows"}
STEP = {"reduction", "normalizer", "inplace"}


def test_types_are_the_librarys_tables():
    assert set(names.NAMES) == set(CHOICES)
    for field, allowed in names.NAMES.items():
        assert typing.get_args(allowed) == tuple(CHOICES[field]), field
    assert typing.get_args(names.AlmDivergence) == tuple(_alm_loss._DIVERGENCES)
    assert typing.get_args(names.StoredLogProbs) == _shards.FORMATS
    text = typing.get_args(names.TextReduction)
    assert text == (*typing.get_args(names.Reduction), "sequence_mean")


@pytest.mark.parametrize("field", names.NAMES)
def test_signatures_have_them(field):
    function, name = field.split(".")
    if name == "divergence" and function == "softmax_divergence":
        functions = [fastkd.softmax_divergence, fastkd.linear_softmax_divergence]
    else:
        functions = [getattr(fastkd, function)]
    for one in functions:
        assert inspect.signature(one).parameters[name].annotation == names.NAMES[field]


def test_no_name_is_plain_text():
    """In a public signature, as for a name of another kind that becomes a type's."""
    functions = [getattr(fastkd, x) for x in fastkd.__all__ if x[0].islower()]
    functions += [getattr(fastkd.recipes, x) for x in fastkd.recipes.__all__ if x[0].islower()]
    assert len(functions) > len(RECIPES)
    for function in filter(inspect.isfunction, functions):
        for name in ("divergence", "reduction", "tail", "renormalize", "teacher_mix"):
            parameter = inspect.signature(function).parameters.get(name)
            if parameter is not None and function is not fastkd.kl_div:
                assert typing.get_origin(parameter.annotation) is typing.Literal, function


@pytest.mark.parametrize("name", FUNCTIONS)
def test_modules_spell_their_options(name):
    function = inspect.signature(FUNCTIONS[name]).parameters
    expected = {
        x: (p.annotation, p.default)
        for x, p in function.items()
        if p.kind is p.KEYWORD_ONLY and x not in BATCH
    }
    if name == "KDLoss":
        for option in STEP:
            del expected[option]
        for option, value in (("label_weight", 0.0), ("square_temperature", True)):
            expected[option] = expected[option][0], value
    found = inspect.signature(getattr(fastkd.nn, name)).parameters
    assert {x: (p.annotation, p.default) for x, p in found.items()} == expected
    assert all(p.kind is p.KEYWORD_ONLY for p in found.values())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_modules_survive_copies_and_modes(name):
    with torch.device("meta"):
        module = getattr(fastkd.nn, name)(temperature=2.0)
    with torch.inference_mode():
        assert repr(getattr(fastkd.nn, name)(temperature=2.0)) == f"{name}(temperature=2.0)"
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(again) == f"{name}(temperature=2.0)"
        assert again.options == module.options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SoftmaxDivergence", {"divergence": "jds"}, "softmax_divergence: divergence must be one"),
        ("SoftmaxDivergence", {"beta": 2.0}, r"softmax_divergence: beta must lie in \[0, 1\]"),
        ("SoftmaxDivergence", {"temperature": -1}, "temperature must be positive"),
        ("SoftmaxDivergence", {"temperature": -torch.ones(3, 2)}, "got -1 in row 0"),
        ("SoftmaxDivergence", {"inplace": 2}, "inplace must be True or False, got int"),
        ("SoftmaxDivergence", {"normalizer": -3.0}, "normalizer must not be negative"),
        ("SoftmaxDivergence", {"vocab_size": 0}, "the vocabulary must have at least one column"),
        ("SoftmaxDivergence", {"vocab_size": "all"}, "vocab_size must be an integer, got str"),
        ("SoftmaxDivergence", {"vocab_start": 3}, "vocab_start needs group"),
        (
            "SoftmaxDivergence",
            {"teacher_weights": [-1.0, 2.0], "teacher_mix": "probs"},
            "teacher_weights must not be negative",
        ),
        ("TopKDivergence", {"divergence": "tvd"}, "topk_divergence: divergence must be one of"),
        ("TopKDivergence", {"tail": "rest"}, "topk_divergence: tail must be one of lump"),
        ("TopKDivergence", {"min_log_prob": 1.0}, "min_log_prob must be negative"),
        ("ClippedDivergence", {"tail": "uniform"}, "clipped_divergence: tail must be one of"),
        ("ClippedDivergence", {"softness": -1.0}, "softness must be positive"),
        ("CrossEntropy", {"label_smoothing": 2.0}, "label_smoothing must lie in"),
        ("CrossEntropy", {"entropy_mask": "all"}, "entropy_mask must be a bool tensor, 'correct'"),
        ("LinearSoftmaxDivergence", {"chunk_size": 0}, "chunk_size must be positive"),
        (
            "LinearSoftmaxDivergence",
            {"student_bias": torch.zeros(4, 2)},
            "linear_softmax_divergence: student_bias must have 1 dimension, got shape",
        ),
        (
            "LinearSoftmaxDivergence",
            {"teacher_bias": [0.0, 1.0]},
            "linear_softmax_divergence: teacher_bias must be a tensor, got list",
        ),
        (
            "LinearSoftmaxDivergence",
            {"student_bias": torch.zeros(4), "teacher_bias": torch.zeros(5)},
            "linear_softmax_divergence: teacher_logits has 5 columns, student_logits has 4",
        ),
        (
            "LinearSoftmaxDivergence",
            {"student_bias": torch.zeros(4).long()},
            "student_bias must be",
        ),
        ("LinearSoftmaxDivergence", {"divergence": "kl"}, "linear_softmax_divergence: divergence"),
        ("AlmLoss", {"divergence": "kl"}, "alm_loss: divergence must be one of binary_ce"),
        ("AlmLoss", {"merge_threshold": 0.1}, "merge_threshold needs teacher_boundary"),
        ("AlmLoss", {"reduction": "sequence_mean"}, "alm_loss: reduction must be one of"),
        ("KDLoss", {"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_a_bad_option_fails_at_once(name, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(fastkd.nn, name)(**options)


def test_options_of_rows_and_teachers():
    """Tensors with one entry a row have a batch's shape; weights number the teachers."""
    student, teacher = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    rows = torch.full((3, 2), 0.3)
    module = fastkd.nn.SoftmaxDivergence(divergence="jsd", beta=rows, temperature=2 * rows)
    expected = fastkd.softmax_divergence(
        student, teacher, divergence="jsd", beta=rows, temperature=2 * rows
    )
    assert torch.equal(module(student, teacher), expected)
    assert repr(module) == (
        "SoftmaxDivergence(divergence='jsd', beta=<tensor [3, 2]>, temperature=<tensor [3, 2]>)"
    )
    for weights in ([0.2, 0.8], torch.tensor([0.2, 0.8]), torch.full((3, 2, 2), 0.5)):
        module = fastkd.nn.SoftmaxDivergence(teacher_weights=weights, vocab_size=4)
        expected = fastkd.softmax_divergence(
            student, [teacher, student], teacher_weights=weights, vocab_size=4
        )
        assert torch.equal(module(student, [teacher, student]), expected)
    tail = fastkd.nn.TopKDivergence(tail="uniform", beta=rows, divergence="jsd")
    best = fastkd.teacher_topk(teacher, 2)
    assert tail(student, *best).isfinite()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_bias_is_a_parameter_of_the_module(side):
    bias = torch.nn.Parameter(torch.randn(4))
    module = fastkd.nn.LinearSoftmaxDivergence(**{f"{side}_bias": bias}, reduction="sum")
    assert [(name, x is bias) for name, x in module.named_parameters()] == [(f"{side}_bias", True)]
    assert repr(module) == (f"LinearSoftmaxDivergence(reduction='sum', {side}_bias=<tensor [4]>)")
    given = [torch.randn(3, 2), torch.randn(4, 2), torch.randn(3, 2), torch.randn(4, 2)]
    expected = fastkd.linear_softmax_divergence(*given, reduction="sum", **{f"{side}_bias": bias})
    (right,) = torch.autograd.grad(expected, bias)
    for run in (module, torch.compile(module, fullgraph=True, backend="eager"), copy.copy(module)):
        loss = run(*given)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, bias)[0], right)
    other = {f"{side}_bias": torch.zeros(4)}
    found = torch.func.functional_call(module, other, tuple(given))
    torch.testing.assert_close(found, module(*given, **other))
    assert copy.deepcopy(module)(*given) == module(*given)
    replica = module._replicate_for_data_parallel()  # has its parameters as plain attributes
    setattr(replica, f"{side}_bias", bias.detach() + 1)
    assert torch.equal(replica(*given), module(*given, **{f"{side}_bias": bias.detach() + 1}))
    assert module.double().get_parameter(f"{side}_bias").dtype == torch.float64


@pytest.mark.parametrize("name", [x for x in FUNCTIONS if x != "AlmLoss"])
def test_a_parameter_that_gets_no_gradient_is_refused(name):
    with pytest.raises(ValueError, match=r"\w+_\w+: temperature takes no gradient"):
        getattr(fastkd.nn, name)(temperature=torch.nn.Parameter(torch.ones(())))
    frozen = torch.nn.Parameter(torch.ones(()), requires_grad=False)
    assert not list(getattr(fastkd.nn, name)(temperature=frozen).parameters())


def test_tensor_options_move_with_the_module():
    module = fastkd.nn.SoftmaxDivergence(
        beta=torch.full((3,), 0.5),
        temperature=torch.tensor(2.0),
        teacher_weights=torch.tensor([0.5, 0.5]),
        normalizer=torch.tensor(1e5),
    )
    assert all(
        x.dtype == torch.float32 for x in module.half().options.values() if torch.is_tensor(x)
    )
    moved = module.to("meta")
    assert moved is module
    assert all(x.is_meta for x in module.options.values() if torch.is_tensor(x))
    boundary = torch.tensor([True, False])
    loss = fastkd.nn.AlmLoss(student_boundary=boundary, teacher_boundary=boundary)
    assert loss.to("meta").options["student_boundary"].is_meta


def test_a_label_weight_without_labels_is_hinted_at():
    student, teacher = torch.randn(2, 3), torch.randn(2, 3)
    for weight in (0.5, 1.0, torch.ones(2)):
        hints.forget()
        loss = fastkd.nn.KDLoss(label_weight=weight)
        with pytest.warns(UserWarning, match="KDLoss: label_weight is .* labels is None") as caught:
            loss(student, teacher)
        assert [x.filename for x in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hints.forget()
        fastkd.nn.KDLoss()(student, teacher)
        loss(student, teacher, torch.tensor([0, 1]))


@pytest.mark.parametrize("name", [x for x in FUNCTIONS if x != "AlmLoss"])
def test_the_check_of_options_gives_no_hint(name):
    """And takes none away from later calls."""
    hints.forget()
    options = {"temperature": 2.0} if name == "KDLoss" else {"normalizer": 0.0}
    if name != "CrossEntropy":
        options["label_weight"] = 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(fastkd.nn, name)(**options)
    p = torch.full((1, 4), 0.25)
    with pytest.warns(UserWarning, match="logits are expected, not probabilities"):
        fastkd.softmax_divergence(p, p)


def test_a_compiled_module_makes_no_call_of_its_own():
    @torch.compile(fullgraph=True, backend="eager")
    def step(x, y):
        return fastkd.nn.SoftmaxDivergence(divergence="jsd")(x, y)

    x, y = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(step(x, y), fastkd.softmax_divergence(x, y, divergence="jsd"))
