"""`megdet chaos`: a training whose processes are killed at random, compared with an undisturbed one."""
