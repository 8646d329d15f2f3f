"""Reports as the tests read them."""

import json
import re
from pathlib import Path

HOSTILE = "</script><script>document.title='broken'</script><b>\u202e"
"""A class name that must stay text."""


def data_of(file: Path):
    return json.loads(re.search(r'id="data">(.*?)</script>', file.read_text()).group(1))
