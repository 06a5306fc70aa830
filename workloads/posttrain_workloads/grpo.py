"""One rank of GRPO with TRL's GRPOTrainer; torchrun starts it, launch starts torchrun.

    python -m posttrain_workloads.launch grpo

It owns what reinforcement learning on rewards gives its trainer; it must not parse any option, and it imports torch
only after its config is read.
"""

from __future__ import annotations

import functools

from posttrain_workloads.arguments import build_args
from posttrain_workloads.prompts import number_rows, shape_prompts
from posttrain_workloads.rank import Rank, assert_world_size, choose_checkpoint, run_rank, train_to_the_end
from posttrain_workloads.scoring import build_rewards
from posttrain_workloads.signal import SignalWatch


def main() -> None:
    """Be one rank."""
    run_rank(train)


def train(rank: Rank) -> None:
    """Train from the newest verified checkpoint, or from the start, to the marked model folder."""
    config, environ = rank.config, rank.environ
    assert config.spec.grpo is not None
    from transformers import set_seed

    from posttrain_workloads.data import load_mixture
    from posttrain_workloads.model import build_peft_config, load_model, load_tokenizer
    from posttrain_workloads.own_rollouts import load_rollouts
    from posttrain_workloads.owncode import build_callbacks, load_trainer_class
    from posttrain_workloads.rollout_modes import set_up_rollouts
    from posttrain_workloads.rollouts import RolloutCallback, Watch, watch_rollouts

    args = build_args(config, environ=environ)
    assert_world_size(config)  # before anything is written: two gangs of one would both be rank 0 of one storage
    set_seed(args.seed)
    callbacks, trainer_class = build_callbacks(config), load_trainer_class(config)
    rollouts = load_rollouts(config)
    rewards = build_rewards(config, environ=environ)
    found = choose_checkpoint(rank)

    tokenizer = load_tokenizer(config, environ=environ)
    shape = functools.partial(shape_prompts, config, templated=bool(tokenizer.chat_template))
    with args.main_process_first(desc="fetching and mixing the data"):
        mixture = load_mixture(config, shape=shape, environ=environ)
    model = load_model(config, environ=environ)
    trainer_class = set_up_rollouts(trainer_class, config, args, model=model, tokenizer=tokenizer)
    watch = Watch()
    train_to_the_end(
        rank,
        found=found,
        tokenizer=tokenizer,
        trainer_class=watch_rollouts(trainer_class, watch, rewards=rewards),
        callbacks=[
            *callbacks,
            RolloutCallback(
                watch,
                SignalWatch(config.spec.grpo.signal.checks.values()),
                storage=rank.storage,
                rank=rank.rank,
                reporter=rank.reporter,
                resumed_from=found.path,
            ),
        ],
        model=model,
        reward_funcs=[reward.for_trainer() for reward in rewards],
        args=args,
        train_dataset=number_rows(mixture.train),
        eval_dataset=number_rows(mixture.test) if mixture.test is not None else None,
        peft_config=build_peft_config(config),
        **rollouts,
    )


if __name__ == "__main__":
    main()
