"""The examples at the end of each verb's help; a test parses every one."""

EXIT_CODES = (
    "0 done; 1 the verdict is bad; 2 the message says what to mend; 75, 130, 143 stopped by SIGUSR1, Ctrl-C, SIGTERM"
)

EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": ("megdet demo", "megdet demo --run runs/short --schedule.epochs 2"),
    "train": (
        "megdet train megdet-r50 --run runs/a --optimizer.base_lr 0.01",
        'megdet train demo --trackers "[tensorboard]" --plain',
        "torchrun --nproc-per-node 8 -m megdet -- train megdet-r50-b256-bn32 --run runs/big",
    ),
    "watch": ("megdet watch runs/demo", "megdet watch runs/demo --once --json"),
    "describe": ("megdet describe demo --devices 3", "megdet describe megdet-r50-b256-bn32 --devices 128 --json"),
    "recipes": (
        "megdet recipes",
        "megdet recipes demo",
        "megdet recipes new birds --data birds/train.json birds/images --val birds/val.json birds/images",
    ),
    "import": ("megdet import torchvision fasterrcnn_resnet50_fpn.pth --run runs/tv",),
    "evaluate": (
        "megdet evaluate runs/demo --json",
        "megdet evaluate runs/demo --data my/test.json my/images",
        "megdet evaluate --ground-truth test.json --detections found.json",
    ),
    "detect": ("megdet detect runs/demo photo.jpg --score 0.3", "megdet detect runs/demo photos --out found"),
    "compare": ("megdet compare runs/a runs/b", "megdet compare runs/a runs/b --kind segm --json"),
    "report": ("megdet report runs/demo --open", "megdet report runs/a runs/b --out both.html"),
    "export": ("megdet export runs/demo", "megdet export runs/demo --to torch-export --out demo.pt2 --images 100"),
    "hub": ("megdet hub push runs/demo me/shapes --private", "megdet hub pull me/shapes --run runs/pulled"),
    "hub push": ("megdet hub push runs/demo me/shapes --private",),
    "hub pull": ("megdet hub pull me/shapes --run runs/pulled",),
    "serve": ("megdet serve runs/demo", "megdet serve runs/a runs/b --port 8080"),
    "ensemble": ("megdet ensemble runs/a runs/b --out runs/both --weights 2,1",),
    "submit": ("megdet submit runs/a --images test2017 --info image_info_test-dev2017.json --alg MegDet",),
    "data": (
        "megdet data check train.json images --all",
        "megdet data stats train.json images --picture stats.png",
        "megdet data convert --from voc VOC2007 data/voc",
    ),
    "data demo": ("megdet data demo data/demo",),
    "data check": ("megdet data check train.json images --masks --json",),
    "data stats": (
        "megdet data stats train.json images --picture stats.png",
        "megdet data stats train.json images --mark 12",
    ),
    "data convert": (
        "megdet data convert --from yolo my_yolo data/mine",
        "megdet data convert --from label-studio export.json data/mine --images photos",
        "megdet data convert --from coco --to yolo data/mine/annotations/train.json yolo --images data/mine/images",
    ),
    "data split": (
        "megdet data split all.json data/mine --parts train=0.7,val=0.2,test=0.1",
        "megdet data split all.json data/mine --group '^patient_[0-9]+' --seed 1",
    ),
    "data merge": ("megdet data merge data/both --data a.json photos/a --data b.json photos/b",),
    "data sample": ("megdet data sample train.json small.json --images 100 --classes cat,dog",),
    "analyse": ("megdet analyse variance runs/demo --batch 16 --factors 1,2,4", "megdet analyse sampling runs/demo"),
    "analyse variance": ("megdet analyse variance runs/demo --batch 16 --factors 1,2,4 --images 256",),
    "analyse sampling": ("megdet analyse sampling runs/a runs/b --epochs 1,6,12",),
    "lr-test": ("megdet lr-test demo --steps 30 --after 5",),
    "plan": (
        "megdet plan demo --devices 2",
        "megdet plan megdet-r50 --devices 8 --memory 24 --hours 12 --price 2.5 --json",
    ),
    "simulate": ("megdet simulate --paper", "megdet simulate --device h200 --bn-size 32 --noise-scale 500"),
    "reproduce": ("megdet reproduce table3", "megdet reproduce figure4 --scale bccd --rows b16-bn0"),
    "audit": ("megdet audit runs/demo", "megdet audit runs/demo --steps 20 --stretches 4 --seed 7 --json"),
    "replay": ("megdet replay runs/demo --step 310", "megdet replay runs/demo --step 310 --without 42"),
    "doctor": ("megdet doctor", "megdet doctor --data my/train.json my/images --run /big/runs"),
    "completion": ("source <(megdet completion bash)", "megdet completion fish | source"),
    "verify": ("megdet verify", "megdet verify --cases short --devices 1,2,3 --steps 3"),
    "chaos": ("megdet chaos demo --kills 10 --devices 1,2", "megdet chaos demo --exact --devices 1,2,3"),
}
"""By verb, or by verb and second word."""
