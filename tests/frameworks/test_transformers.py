"""Hugging Face's Trainer on a pool, with a tiny model that is made here. On CPUs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import skyward as sky

pytest.importorskip("transformers", reason="transformers is not installed: no wheel for this Python, or not asked for")


@sky.integrations.transformers
@sky.compute
def fine_tune(folder: Path) -> tuple[int, int, np.ndarray, float]:
    import torch
    import torch.distributed as dist
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

    set_seed(1)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    tokens = torch.randint(1, 50, (48, 6))
    dataset = [{"input_ids": row, "labels": int(row[0] > 25)} for row in tokens]
    arguments = TrainingArguments(
        output_dir=str(folder / str(dist.get_rank())),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=BertForSequenceClassification(config), args=arguments, train_dataset=dataset)
    done = trainer.train()
    weights = np.concatenate([p.detach().numpy().ravel() for p in trainer.model.parameters()])
    return trainer.args.world_size, done.global_step, weights, done.training_loss


def test_a_trainer_on_three_nodes_ends_with_equal_weights(pool: sky.ComputePool, tmp_path: Path) -> None:
    results = fine_tune(tmp_path) @ pool

    for size, steps, weights, loss in results:
        assert (size, steps) == (3, 8)  # 48 ÷ (3 × 4), twice
        assert np.isfinite(loss)
        np.testing.assert_array_equal(weights, results[0][2])
