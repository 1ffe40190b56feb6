"""What each group of instructions does; importing the package registers them all."""

from . import arithmetic, convert, copies, integers, loads, matrices, moves, tma, warps, wgmma

__all__ = ["arithmetic", "convert", "copies", "integers", "loads", "matrices", "moves", "tma", "warps", "wgmma"]
