"""The table of recipes: which call is which paper, what it rests on, how it was checked."""

from typing import NamedTuple


class Recipe(NamedTuple):
    """A published method and its calls in ``fastkd.recipes``.

    ``evidence``: C, the authors' code was read; T, the paper's text; S, second-hand accounts; M,
    recalled and not verified.
    """

    #: In the project's list of forty papers; None for methods beyond it.
    number: int | None
    arxiv: str
    title: str
    calls: tuple[str, ...]
    evidence: str
    #: The identities and limits that the tests compare it with, beside its definition in loops.
    checked: str


# fmt: off
RECIPES = (
    Recipe(1, "2503.02832", "AlignDistil", ("align_distil",), "C", "equal teacher and reference: beta / 1e-3 reverse KL; theorem1 of equal betas"),
    Recipe(2, "2306.12442", "TRG", ("trg",), "S", "equal features: only the global term; the order of tokens does not matter"),
    Recipe(3, "2407.10068", "MGSR", ("mgsr", "mgsr_position", "mgsr_span"), "S+M", "equal models 0; spans of one token 0; normalised products are softmax(z + z')"),
    Recipe(4, "2508.16998", "DeAR", ("dear", "rank_net", "list_net", "lambda_rank"), "C", "the order of passages does not matter; the ideal order has the least loss; two passages: the authors' loss up to its discounts; alpha 1 is KD"),
    Recipe(5, "2408.15562", "FSPAD", ("fspad",), "C", "weights (1, 0) is the op's cross-entropy, (0, 1) torch's SmoothL1"),
    Recipe(6, "2505.18642", "Skip-Thinking", ("sequence_kd",), "S", "F.cross_entropy; the chunks' sums add up to the whole"),
    Recipe(7, "2510.24940", "SemCoT", ("infonce", "semcot"), "C", "equal orthogonal rows log(1 + (n - 1) / e); without an answer alpha times the cosine distance"),
    Recipe(8, "2503.20083", "ALM", ("alm", "alm_latents"), "C", "chunk by chunk in loops"),
    Recipe(9, "2509.26488", "dParallel", ("dparallel",), "C", "none correct: cross-entropy alone; the entropy's derivative"),
    Recipe(10, "2106.02241", "ERNIE-Tiny", ("ernie_tiny",), "S+M", "equal models 0; padding is neither row nor column"),
    Recipe(11, "2312.10193", "Adaptive computation modules", ("acm_phase1_loss", "acm_phase2_loss", "acm_phase3_loss"), "C+T", "as fastkd.acm's own"),
    Recipe(12, "2410.15017", "DM-Codec", ("dm_codec", "semantic_distillation"), "C", "equal features log(1 + 1/e)"),
    Recipe(13, "2501.10322", "HAT: bytes, no teacher", ("sequence_kd",), "S", "F.cross_entropy"),
    Recipe(14, "2409.20449", "LELP", ("lelp", "lelp_subclasses"), "S", "one subclass is KD; the target's sums are the teacher's classes; principal coordinates; a shift of the class"),
    Recipe(15, "2510.19779", "AdaSPEC", ("adaspec",), "C", "keep 1 is plain KL; a stored reference is the live one; the difference by log-sum-exps"),
    Recipe(16, "2212.08349", "Swing", ("swing",), "S+M", "privacy 0 without noise is KD; one generator, one loss"),
    Recipe(17, "2403.06914", "MEND", ("mend",), "C", "equal masks are KD"),
    Recipe(18, "2306.15876", "Hybrid Distillation", ("hybrid_distill", "token_relations"), "S+M", "equal models 0; the order of tokens does not matter; causal scores"),
    Recipe(19, "2408.10755", "Fair synthetic data", ("fair_latent", "distance_covariance", "distance_correlation"), "S", "correlation 0 and 1 of independent and equal variables"),
    Recipe(20, "2109.11105", "Distiller (MI-alpha)", ("mi_alpha", "feature_distance"), "C", "below the known information of Gaussians; a dominant score; the order of the batch does not matter"),
    Recipe(21, "2505.12674", "SiD", ("sid_generator", "sid_score"), "C+M", "alpha 1 in its short form; NaN samples dropped"),
    Recipe(22, "2304.12314", "DistillNearest, DistillWeighted (and PARC)", ("distill_weighted", "parc"), "C+M", "one source is KD; one-hot features 100, random ones near 0"),
    Recipe(23, "2506.16738", "LM-SPT", ("lm_spt",), "S", "100 times the mean squared error"),
    Recipe(24, "2112.12650", "Romanian DistilBERT", ("distilbert",), "S+M", "copies of one teacher are that teacher"),
    Recipe(25, "2303.15678", "DisWOT", ("diswot", "sp", "ickd", "rkd"), "C+M", "rotations and scale change nothing; equal features 0"),
    Recipe(26, "2009.08453", "MEAL V2", ("meal_v2", "meal_v2_discrimination", "fkd"), "C", "equal teachers are one; soft labels written out"),
    Recipe(27, "2505.14464", "Not All Correct Answers Are Equal", ("sequence_kd",), "T", "F.cross_entropy"),
    Recipe(28, "2505.20836", "HAD", ("had",), "S", "all visible: MSE; none visible: cross-entropy"),
    Recipe(29, "2408.15881", "LLaVA-MoD", ("llava_mod", "preference"), "C", "unequal widths, cut to the columns of both; equal models: log 2, kto_pair 1/2"),
    Recipe(30, "1802.05668", "Quantised distillation", ("quantized_distillation", "bucket_quantize"), "C", "torch's two losses; none asked: cross-entropy; levels and error of a bucket"),
    Recipe(31, "2310.08461", "DistillSpec", ("distillspec", "acceptance"), "S+M", "acceptance is the sum of the smaller probabilities"),
    Recipe(32, "2409.11282", "FLAN-T5 for documents", ("sequence_kd",), "S", "F.cross_entropy"),
    Recipe(33, "2506.10274", "Discrete audio tokens (survey)", ("semantic_distillation",), "S", "equal features log(1 + 1/e)"),
    Recipe(34, "2507.03745", "StreamDiT", ("stream_dit", "stream_dit_inputs"), "S", "the velocity is the derivative of the inputs"),
    Recipe(35, "2404.02900", "DeiT-LT", ("deit_lt", "class_balanced_weights"), "C", "torch's weighted cross-entropy; equal counts weigh 1"),
    Recipe(36, "2402.13116", "Knowledge distillation of LLMs (survey)", ("mmd",), "T", "equal sets 0; each of its objectives has a call"),
    Recipe(37, "2407.13254", "LAD (and CWD)", ("cwd", "lad_consistency", "lad_label_map"), "C", "the order of pixels does not matter; a large temperature gives half the variance"),
    Recipe(38, "2410.09303", "Exact byte-level probabilities", ("byte_kd",), "S", "enumerated over small vocabularies; equal models 0; never above the tokens' KL"),
    Recipe(39, "2505.21600", "R2R", ("r2r", "r2r_features", "r2r_log_u"), "C", "raw logits are topk's; torch's binary cross-entropy; digamma by its series; undefined evidence"),
    Recipe(40, "2407.16154", "DDK", ("ddk", "ddk_factors"), "T", "cross-entropy plus gamma KL; shares sum to 1"),
    Recipe(None, "1503.02531", "Hinton's distillation", ("kd",), "T", "alpha 1 is the divergence with the temperature squared"),
    Recipe(None, "2402.12030", "ULD", ("uld",), "C", "equal vocabularies: sorted probabilities"),
    Recipe(None, "2401.10491", "MinED of FuseLLM", ("mined", "edit_distance_map"), "C", "token by token in loops"),
    Recipe(None, "2406.17328", "DSKD", ("dskd",), "C", "text by text in loops"),
    Recipe(None, "2306.13649", "GKD", ("gkd",), "C", "beta 0 and 1 are forward and reverse KL"),
    Recipe(None, "2605.07865", "On-policy distillation (Tinker, vOPD)", ("opd",), "C", "expected gradients over the sampled token: k1 and k2 reverse KL, k3 forward KL"),
    Recipe(None, "2601.19897", "SDFT, SDPO: the student's top k", ("opd_topk",), "C", "k = vocabulary is the whole divergence; never above it"),
    Recipe(None, "2306.08543", "MiniLLM", ("minillm",), "C", "expected gradient of gamma 0 before whitening is opd's; equal models 0"),
    Recipe(None, "2402.03898", "DistiLLM", ("distillm",), "C", "beta 0 is forward or reverse KL"),
    Recipe(None, "2503.07067", "DistiLLM-2", ("distillm2", "distillm2_alphas"), "C+M", "alphas 0 and beta 1: forward plus reverse KL; the mixture has no gradient"),
    Recipe(None, "2501.16937", "TAID", ("taid",), "C", "t 1 is the cross-entropy with the teacher, t 0 has no gradient; the schedule in loops"),
    Recipe(None, "2404.02657", "AKL", ("akl",), "C", "between forward and reverse KL; a head of one token"),
    Recipe(None, "2505.04560", "ABKD", ("abkd",), "C", "alpha and beta 1 and 0 are forward and reverse KL; 1 and 1 half the squared distance"),
    Recipe(None, "2510.24021", "SelecTKD", ("select_tkd",), "S", "k = vocabulary, or a rejected weight of 1, is plain KL"),
    Recipe(None, "2604.14084", "TIP", ("tip",), "S+M", "keep 1 is plain KL; scores by loops"),
    Recipe(None, "2603.07079", "Entropy-aware OPD", ("eopd",), "S+M", "thresholds below and above all entropies: both terms, one term"),
    Recipe(None, "2602.01395", "SE-KD; TA-OPD", ("token_budget",), "S", "torch.quantile of the rows that count"),
    Recipe(None, "2406.13555", "BiLD", ("bild",), "C", "constants added to a row change nothing; equal models 0"),
    Recipe(None, "2407.14679", "Minitron", ("minitron",), "C", "balanced: twice the KL"),
    Recipe(None, "2406.19774", "DPKD; DPO, IPO, KTO", ("preference",), "C+M", "equal models: log 2, kto_pair 1/2"),
    Recipe(None, "2506.15702", "Minifinetuning", ("mft",), "C", "the corrected label is ahead by the threshold"),
    Recipe(None, "2610.08448", "Strict top-k", ("strict_topk", "shared_tokens"), "S", "one vocabulary, k of all tokens: reverse KL"),
    Recipe(None, "2402.12030", "GOLD", ("gold",), "C", "one vocabulary: JSD; nothing shared: uld"),
    Recipe(None, "2605.21699", "X-Token", ("x_token", "token_projection", "balanced"), "C", "one vocabulary: forward and reverse KL; nothing common: uld"),
    Recipe(None, "2607.22334", "BPM", ("bpm", "prefix_map"), "S+M", "mass is conserved; an identity map is KL; the map by bytes"),
    Recipe(None, "2203.08679", "DKD", ("dkd",), "C", "alpha 1 and beta 1 - p_t: the KL divergence; a label nearly certain"),
    Recipe(None, "2205.10536", "DIST", ("dist",), "C", "rows without variance"),
    Recipe(None, "1905.00414", "CKA", ("linear_cka",), "T", "rotations and scale change nothing; equal features 1"),
)
# fmt: on

_HEAD = ("#", "arXiv", "paper", "calls", "evidence", "how it was checked")


def _cells(recipe: Recipe) -> tuple[str, ...]:
    number = "" if recipe.number is None else str(recipe.number)
    calls = ", ".join(f"`{call}`" for call in recipe.calls)
    return (number, recipe.arxiv, recipe.title, calls, recipe.evidence, recipe.checked)


def markdown() -> str:
    """The table as ``docs/recipes.md`` has it, a line for each recipe."""
    lines = [_HEAD, ("--",) * len(_HEAD), *map(_cells, RECIPES)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def listing() -> str:
    """arXiv number, calls and title of each recipe, for the package's documentation."""
    lines = []
    for recipe in RECIPES:
        lines.append(f"{recipe.arxiv:12}{', '.join(recipe.calls)}: {recipe.title}\n")
    return "".join(lines)
