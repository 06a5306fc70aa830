"""One rank of supervised fine-tuning with TRL's SFTTrainer; torchrun starts it, launch starts torchrun.

    python -m posttrain_workloads.launch sft

It owns what supervised fine-tuning gives its trainer; it must not parse any option, and it imports torch only after its
config is read.
"""

from __future__ import annotations

import functools

from posttrain_workloads.arguments import build_args
from posttrain_workloads.formats import shape_for_sft
from posttrain_workloads.rank import Rank, assert_world_size, choose_checkpoint, run_rank, train_to_the_end


def main() -> None:
    """Be one rank."""
    run_rank(train)


def train(rank: Rank) -> None:
    """Train from the newest verified checkpoint, or from the start, to the marked model folder."""
    config, environ = rank.config, rank.environ
    from transformers import set_seed

    from posttrain_workloads.data import load_mixture
    from posttrain_workloads.model import build_peft_config, load_model, load_tokenizer
    from posttrain_workloads.owncode import build_callbacks, load_trainer_class

    args = build_args(config, environ=environ)
    assert_world_size(config)  # before anything is written: two gangs of one would both be rank 0 of one storage
    set_seed(args.seed)
    callbacks, trainer_class = build_callbacks(config), load_trainer_class(config)
    found = choose_checkpoint(rank)

    with args.main_process_first(desc="fetching and mixing the data"):
        mixture = load_mixture(config, shape=functools.partial(shape_for_sft, config), environ=environ)
    train_to_the_end(
        rank,
        found=found,
        tokenizer=load_tokenizer(config, environ=environ),
        trainer_class=trainer_class,
        callbacks=callbacks,
        model=load_model(config, environ=environ),
        args=args,
        train_dataset=mixture.train,
        eval_dataset=mixture.test,
        peft_config=build_peft_config(config),
    )


if __name__ == "__main__":
    main()
