"""The vision-language model: checkpoints, prompts, pixels and answers, on the stock Hugging Face classes."""

import logging
from importlib import metadata

from packaging.specifiers import SpecifierSet

TRANSFORMERS = SpecifierSet(">=5.17,<5.24")
"""The versions of transformers that pyproject.toml asks for; the tests ran with the first and the last of them."""

_installed = metadata.version("transformers")
if not TRANSFORMERS.contains(_installed, prereleases=True):
    logging.getLogger(__name__).warning(
        "transformers %s is not supported; mend it with: pip install 'transformers%s'", _installed, TRANSFORMERS
    )
