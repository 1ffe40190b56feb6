"""Deep InfoMax losses at the speed of bare matrix products, without the pair tensor.

The layers, from the outside in (nothing imports anything above it):

    functional, modules   the public losses: validate, choose, compute, reduce
    ops, pair_ops         torch.library ops with their autograd: of the dot critic, of the pair MLP
    grouped               the dot critic's over several processes; distributed: their collectives
    one_negative          the losses with one negative for each image, in ordinary PyTorch
    streaming             the driver: score -> map -> finish -> accumulate over blocks of pairs
    backends/             the map step on each device
    plan, config          what to compute and how, within which memory
    critics               critics with weights of their own
    estimators            the maths, one row for each estimator
    reference             the naive pair tensor, beside `ops`: the oracle and the honest baseline
    validate, native, explain   input errors; the native library; texts for people
"""

from ._version import __version__
from .config import config
from .critics import PairMLPCritic
from .distributed import GroupError
from .explain import doctor, explain
from .functional import LossParts, donsker_varadhan_loss, fenchel_dual_loss, infonce_loss
from .modules import DonskerVaradhanLoss, FenchelDualLoss, InfoNCELoss
from .plan import BACKENDS

__all__ = [
    "BACKENDS",
    "DonskerVaradhanLoss",
    "FenchelDualLoss",
    "GroupError",
    "InfoNCELoss",
    "LossParts",
    "PairMLPCritic",
    "__version__",
    "config",
    "doctor",
    "donsker_varadhan_loss",
    "explain",
    "fenchel_dual_loss",
    "infonce_loss",
]
