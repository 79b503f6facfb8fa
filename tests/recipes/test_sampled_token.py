"""opd and minillm against their definitions, and their expected gradients."""

import pytest
import torch
from recipe_checks import (
    Entry,
    kept_of,
    mixed_dtypes,
    one_graph,
    one_graph_for_all,
    problem,
    promises,
)

import fastkd
from fastkd import recipes

WITHOUT_COLUMNS = ("none", "sum", "mean", "batchmean", "sequence_mean")


def sampled(dtype, teacher="logits", old=False, weighted=False):
    """Labels, and the teacher as logits or as log-probabilities of the labels."""
    tensors = problem(dtype, "labels")
    labels = tensors["labels"].clamp(min=0).unsqueeze(-1)
    if teacher == "log_probs":
        log_p = tensors["teacher_logits"].double().log_softmax(-1).gather(-1, labels)
        tensors["teacher"] = log_p.squeeze(-1).to(dtype)
        del tensors["teacher_logits"]
    elif teacher == "logits":
        tensors["teacher"] = tensors.pop("teacher_logits")
    if old:  # a student that differs by up to 30 %
        log_q = tensors["student_logits"].double().log_softmax(-1).gather(-1, labels).squeeze(-1)
        tensors["old_log_probs"] = (log_q + 0.6 * torch.rand(log_q.shape) - 0.3).to(dtype)
    if weighted:
        tensors["sampling_weight"] = torch.rand(tensors["mask"].shape, dtype=dtype) + 0.5
    return tensors


def label_rows(tensors, teacher, temperature=1.0):
    """log q, log p of the labels as lists of texts, None where a row does not count."""
    kept, labels, found = kept_of(tensors), tensors["labels"], ([], [])
    for logits, texts in zip((tensors["student_logits"], tensors[teacher]), found, strict=True):
        for b in range(len(labels)):
            rows = []
            for t in range(labels.size(1)):
                row = logits[b, t]
                if kept[b, t] and row.dim():
                    row = (row / temperature).log_softmax(-1)[labels[b, t]]
                rows.append(row if kept[b, t] else None)
            texts.append(rows)
    return found


def returns(rewards, discount):
    """The discounted sum of a text's rewards from each row on."""
    found, later = [], 0.0
    for reward in reversed(rewards):
        later = (0.0 if reward is None else reward) + discount * later
        found.append(later)
    return found[::-1]


def surrogate(ratio, advantage, clip):
    if clip is None:
        return -ratio * advantage
    return -min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def plain_opd(
    tensors,
    estimator="k1",
    clip=None,
    coefficient=1.0,
    discount=0.0,
    temperature=1.0,
    baseline=None,
):
    log_q, log_p = label_rows(tensors, "teacher", temperature)
    losses = []
    for b, (mine, other) in enumerate(zip(log_q, log_p, strict=True)):
        rewards = [
            None if q is None else (p - q).detach() for q, p in zip(mine, other, strict=True)
        ]
        for t, advantage in enumerate(returns(rewards, discount)):
            q, p = mine[t], other[t]
            if q is None:
                losses.append(torch.zeros(()).double())
            elif estimator == "k2":
                losses.append(coefficient * 0.5 * (p - q) ** 2)
            elif estimator == "k3":
                losses.append(coefficient * ((p - q).exp() - 1 - (p - q)))
            else:
                if baseline:
                    z, y = (
                        tensors[x][b, t].detach() / temperature
                        for x in ("student_logits", "teacher")
                    )
                    z, y = z.log_softmax(-1), y.log_softmax(-1)
                    advantage = advantage + (z.exp() * (z - y)).sum()
                old = tensors["old_log_probs"][b, t] if "old_log_probs" in tensors else q.detach()
                losses.append(surrogate((q - old).exp(), coefficient * advantage, clip))
    return torch.stack(losses).view(kept_of(tensors).shape)


def plain_minillm(tensors, gamma=0.95, clip=0.2, length_norm=True, single_step=True):
    log_q, log_p = label_rows(tensors, "teacher_logits")
    all_advantages, rows = [], []
    for b, (mine, other) in enumerate(zip(log_q, log_p, strict=True)):
        old = [
            None
            if q is None
            else tensors["old_log_probs"][b, t]
            if "old_log_probs" in tensors
            else q.detach()
            for t, q in enumerate(mine)
        ]
        rewards = [None if q is None else (p - q).detach() for q, p in zip(old, other, strict=True)]
        for t, value in enumerate(returns(rewards, gamma)):
            if mine[t] is None:
                continue
            left = sum(reward is not None for reward in rewards[t:])
            all_advantages.append(value / left if length_norm else value)
            rows.append((b, t, mine[t], old[t]))
    mean = sum(all_advantages) / len(rows)
    variance = sum((x - mean) ** 2 for x in all_advantages) / len(rows)
    losses = torch.zeros(kept_of(tensors).shape).double()
    for (b, t, q, old), advantage in zip(rows, all_advantages, strict=True):
        ratio = (q - old).exp()
        if "sampling_weight" in tensors:
            ratio = ratio * tensors["sampling_weight"][b, t]
        loss = surrogate(ratio, (advantage - mean) / (variance + 1e-8).sqrt(), clip)
        if single_step:
            z, y = (tensors[f"{x}_logits"][b, t].log_softmax(-1) for x in ("student", "teacher"))
            loss = loss + (z.exp() * (z - y)).sum()
        losses = losses.index_put((torch.tensor(b), torch.tensor(t)), loss)
    return losses


def entry(name, losses, options, published=None, **kinds):
    return Entry(
        name,
        losses,
        options,
        problem=lambda dtype: sampled(dtype, **kinds),
        reductions=WITHOUT_COLUMNS,
        published=published or {},
    )


OPD = {"estimator": "k1", "clip": None, "coefficient": 1.0, "discount": 0.0, "baseline": None}
MINILLM = {
    "gamma": 0.95,
    "clip": 0.2,
    "length_norm": True,
    "single_step": True,
    "reward_clip": 100.0,
}
ENTRIES = [
    entry("opd", plain_opd, {}, OPD),
    entry("opd", plain_opd, {"estimator": "k2", "temperature": 1.5}),
    entry("opd", plain_opd, {"estimator": "k3", "coefficient": 0.3}, teacher="log_probs"),
    entry("opd", plain_opd, {"clip": 0.2, "discount": 0.9}, teacher="log_probs", old=True),
    entry("opd", plain_opd, {"baseline": "kl", "discount": 0.5}),
    entry("minillm", plain_minillm, {}, MINILLM, teacher=None),
    entry("minillm", plain_minillm, {"clip": 0.1}, teacher=None, old=True, weighted=True),
    entry(
        "minillm",
        plain_minillm,
        {"gamma": 0.0, "single_step": False, "length_norm": False},
        teacher=None,
    ),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
LOGITS, STORED = sampled(torch.float32), sampled(torch.float32, "log_probs", old=True)
BOTH = sampled(torch.float32, teacher=None)
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "all": lambda x: (
            recipes.opd(**LOGITS, coefficient=x, discount=x, temperature=x)
            + recipes.opd(**STORED, clip=x)
            + recipes.minillm(**BOTH, gamma=x, clip=x, reward_clip=x, temperature=x)
        )
    }
)


@pytest.mark.parametrize("baseline", [None, "kl"])
def test_expected_gradients(baseline):
    """Summed over the sampled token, weighted by its probability."""
    z, y = (torch.randn(1, 7, dtype=torch.float64).requires_grad_(i == 0) for i in range(2))
    q = z.detach().softmax(-1)[0]
    right = {"k1": "reverse_kl", "k2": "reverse_kl", "k3": "forward_kl"}
    for estimator, divergence in right.items():
        if baseline and estimator != "k1":
            continue
        total = torch.zeros_like(z)
        for token in range(7):
            loss = recipes.opd(z, y, torch.tensor([token]), estimator=estimator, baseline=baseline)
            total += q[token] * torch.autograd.grad(loss, z)[0]
        exact = fastkd.softmax_divergence(z, y, divergence=divergence)
        torch.testing.assert_close(total, torch.autograd.grad(exact, z)[0])


def test_the_value_of_k1_estimates_the_reverse_kl():
    z, y = torch.randn(2, 1, 7, dtype=torch.float64).unbind()
    losses = torch.stack([recipes.opd(z, y, torch.tensor([token])) for token in range(7)])
    found = (z.softmax(-1)[0] * losses).sum()
    torch.testing.assert_close(found, fastkd.softmax_divergence(z, y, divergence="reverse_kl"))


def test_minillm_of_equal_models():
    tensors = sampled(torch.float64, teacher=None)
    tensors["student_logits"] = tensors["teacher_logits"].clone().requires_grad_()
    loss = recipes.minillm(**tensors)
    loss.backward()
    assert abs(loss) < 1e-12
    assert tensors["student_logits"].grad.norm() < 1e-10


def test_rewards_are_limited():
    tensors = sampled(torch.float64, teacher=None)
    options = {"single_step": False, "reduction": "none"}
    for limit, same in ((100.0, True), (0.5, False)):
        found = recipes.minillm(**tensors, reward_clip=limit, **options)
        assert torch.equal(found, recipes.minillm(**tensors, reward_clip=1e9, **options)) == same


def test_errors():
    tensors = sampled(torch.float32)
    for name, value in (
        ("old_log_probs", torch.zeros(3, 5)),
        ("clip", 0.2),
        ("discount", 0.5),
        ("baseline", "kl"),
    ):
        with pytest.raises(ValueError, match=f"opd: {name} needs estimator k1, got 'k2'"):
            recipes.opd(**tensors, estimator="k2", **{name: value})
    with pytest.raises(ValueError, match="opd: estimator must be one of k1, k2, k3"):
        recipes.opd(**tensors, estimator="k4")
    with pytest.raises(ValueError, match="opd: baseline kl needs the teacher's logits"):
        recipes.opd(**sampled(torch.float32, "log_probs"), baseline="kl")
    with pytest.raises(ValueError, match="opd: teacher takes no gradient"):
        recipes.opd(**{**tensors, "teacher": tensors["teacher"].clone().requires_grad_()})
    with pytest.raises(ValueError, match=r"opd: teacher must be float \[3, 5\]"):
        recipes.opd(**{**tensors, "teacher": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=r"opd: discount must lie in \[0, 1\], got 2"):
        recipes.opd(**tensors, discount=2.0)
    with pytest.raises(ValueError, match=r"opd: old_log_probs must be float \[3, 5\]"):
        recipes.opd(**tensors, old_log_probs=torch.zeros(3, 4))
    with pytest.raises(IndexError, match="token_log_probs: token_ids"):
        recipes.opd(**{**tensors, "labels": torch.full((3, 5), 11)})
    tensors = sampled(torch.float32, None)
    with pytest.raises(TypeError, match="minillm: labels must be int64 or int32"):
        recipes.minillm(**{**tensors, "labels": tensors["labels"].float()})
    with pytest.raises(ValueError, match="minillm: sampling_weight must be float"):
        recipes.minillm(**tensors, sampling_weight=torch.ones(5))
