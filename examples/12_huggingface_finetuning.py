"""Hugging Face's Trainer on two nodes, with a tiny model that is created here, so nothing is downloaded.

Needs `pip install torch transformers accelerate`. Runs on this machine; with ``provider=sky.AWS(), accelerator="T4"``
in the pool, on GPUs. For a real model, use `AutoModelForSequenceClassification.from_pretrained(...)` instead.
"""

from __future__ import annotations

import tempfile

import skyward as sky


@sky.integrations.transformers
@sky.compute
def fine_tune(epochs: int) -> tuple[int, float, float]:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

    set_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    tokens = torch.randint(1, 100, (256, 8))
    dataset = [{"input_ids": row, "labels": int(row[0] > 50)} for row in tokens]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=5e-3,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = Trainer(model=BertForSequenceClassification(config), args=arguments, train_dataset=dataset)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.args.process_index, float(losses[0]), float(losses[-1])


def main() -> None:
    with sky.ComputePool(nodes=2, image=sky.Image(pip=["torch", "transformers", "accelerate"])) as pool:
        for rank, first, last in fine_tune(epochs=5) @ pool:
            print(f"rank {rank}: loss {first:.3f} → {last:.3f}")


if __name__ == "__main__":
    main()
