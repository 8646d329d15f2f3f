"""The web demo: a page and an HTTP endpoint over trained detectors. Its packages are the extra `megdet[serve]`."""
