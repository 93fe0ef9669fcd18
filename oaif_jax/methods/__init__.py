"""The methods by name, each in a file that reads on one screen. config.method names one."""

from oaif_jax.base.errors import UserError, near
from oaif_jax.methods.annotator import AnnotatorTraining
from oaif_jax.methods.base import Method
from oaif_jax.methods.offline import Offline
from oaif_jax.methods.online import Online
from oaif_jax.methods.reinforce import Reinforce
from oaif_jax.methods.reward import Reward, RewardOfAI
from oaif_jax.methods.selm import SELM
from oaif_jax.methods.sft import SFT
from oaif_jax.methods.xpo import XPO

METHODS: dict[str, type[Method]] = {
    "online": Online,
    "selm": SELM,
    "xpo": XPO,
    "reinforce": Reinforce,
    "offline": Offline,
    "sft": SFT,
    "reward": Reward,
    "reward_ai": RewardOfAI,
    "annotator": AnnotatorTraining,
}


def named(name: str) -> type[Method]:
    """The method that config.method names; UserError for another name."""
    if name not in METHODS:
        raise UserError(f"config.method={name!r}, wanted one of {', '.join(METHODS)}{near(name, METHODS)}")
    return METHODS[name]
