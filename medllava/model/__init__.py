"""The vision-language model: checkpoints, prompts, pixels and answers, on the stock Hugging Face classes."""

import logging
from importlib import metadata

from packaging.specifiers import SpecifierSet

TRANSFORMERS = SpecifierSet(">=5.18,<5.24")
"""The versions of transformers that pyproject.toml asks for. ``tests/model`` ran with 5.18 and 5.23; in 5.17 the
weights of an image encoder have other names."""

_installed = metadata.version("transformers")
if not TRANSFORMERS.contains(_installed, prereleases=True):
    logging.getLogger(__name__).warning(
        "transformers %s is not supported; mend it with: pip install 'transformers%s'", _installed, TRANSFORMERS
    )
