"""The head as one linear map, adapters included: fastrl.models.linear, under the name that the drop-ins use."""

from fastrl.models.linear import LinearForm, LowRank, Parts, linear_form, parts_of

__all__ = ["LinearForm", "LowRank", "Parts", "linear_form", "parts_of"]
