"""Mutants of the Metal kernels that no test can notice, each with its reason: the change changes nothing that is seen."""

SURVIVORS: dict[tuple[str, str], str] = {}
