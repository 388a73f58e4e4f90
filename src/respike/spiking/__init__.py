"""Spiking models from others: calibrate neurons, count what they fire, write the folder."""

from respike.spiking.calibrate import Goal, calibrate
from respike.spiking.census import Census
from respike.spiking.execute import Measure, recount, spike

__all__ = ["Census", "Goal", "Measure", "calibrate", "recount", "spike"]
