"""A tiny random model, its teacher, texts, and Trainers of them; as a script, one of two ranks."""

import os
import sys
from pathlib import Path

import torch
import transformers
from group_end import leave

import fastkd
from fastkd.integrations import KDOptions
from fastkd.integrations.transformers import DistillationTrainer

VOCAB, LENGTH, TEXTS = 37, 7, 8


def model(seed, width=16, layers=1):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
            tie_word_embeddings=False,
            attention_dropout=0.0,
        )
    )


def texts(stored=None, temperature=1.0):
    """Texts of one length; some labels are ignored, in each text another number."""
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (TEXTS, LENGTH), generator=random)
    labels = ids.clone()
    labels[torch.rand(TEXTS, LENGTH, generator=random) < 0.4] = -100
    found = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
    if stored is not None:
        teacher, k = stored
        with torch.no_grad():
            best = fastkd.teacher_topk(teacher(input_ids=ids).logits, k, temperature=temperature)
        for text, log_probs, indices in zip(found, *best, strict=True):
            text |= {"teacher_log_probs": log_probs, "teacher_indices": indices}
    return found


def trainer(folder, student, *, teacher=None, dataset=None, batch=8, accumulate=1, **kd):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    return DistillationTrainer(
        model=student,
        args=arguments,
        train_dataset=texts() if dataset is None else dataset,
        eval_dataset=texts() if dataset is None else dataset,
        teacher=teacher,
        kd=KDOptions(**kd),
    )


def moved(before, after):
    """What one step of SGD with learning rate 1 took off the parameters: the gradient."""
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return torch.cat([(a - b).detach().flatten() for a, b in pairs])


def main(folder):
    """Train a step on this rank's texts; the first rank saves the gradient."""
    student = model(1)
    run = trainer(folder, student, teacher=model(2, 24), batch=4, label_weight=0.5)
    run.train()
    if int(os.environ["RANK"]) == 0:
        torch.save(moved(model(1), student), Path(folder) / "gradient.pt")
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
