"""Adapting trained layers to other data, and seeing whether they need it."""

from bnfast.adaptation.monitor import LayerReport, Monitor, monitoring
from bnfast.adaptation.recalibration import Recalibration, recalibrating

__all__ = ["LayerReport", "Monitor", "Recalibration", "monitoring", "recalibrating"]
