"""Images that are not on this machine's disks: addresses, requests, copies of files."""
