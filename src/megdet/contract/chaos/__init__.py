"""`megdet chaos`: a training under kills, compared with one without."""
