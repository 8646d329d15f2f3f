import io

from rich.console import Console

from coco_tasks import detection, ground_truth
from megdet.evaluation.coco_numbers import evaluate_detections
from megdet.evaluation.tables import numbers_table, per_class_table


def printed(table):
    console = Console(width=100, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_the_tables_show_percent_and_a_dash_where_there_is_nothing():
    truth = ground_truth((0, 0, 50, 50))
    truth["categories"][1]["name"] = "[bold]犬"
    numbers = evaluate_detections(truth, [detection(0, 0, 50, 50)]).bbox
    rows = [line.split() for line in printed(numbers_table(numbers, "boxes")).splitlines()]
    values = [row[1:4:2] for row in rows if len(row) > 3 and row[1][:2] in ("mm", "AP", "AR")]
    assert values[:2] == [["mmAP", "100.0"], ["mmAR", "100.0"]]
    assert ["APs", "-"] in values
    assert "[bold]犬" in printed(per_class_table(numbers, "boxes"))


def test_of_many_classes_the_first_and_the_worst_twenty_are_printed():
    many = 13_204
    box = {"iscrowd": 0, "bbox": [0, 0, 50, 50], "area": 2500, "image_id": 1}
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": i, "name": f"class{i:05d}"} for i in range(many)],
        "annotations": [{**box, "id": i, "category_id": i} for i in range(100, many)],
    }
    missed = range(5000, 5050)
    found = [detection(0, 0, 50, 50, category_id=i) for i in range(100, many) if i not in missed]
    numbers = evaluate_detections(truth, found).bbox
    assert len(numbers.per_class) == len(numbers.as_dict()["per_class"]) == many
    table = per_class_table(numbers, "boxes")
    names = [word for word in printed(table).split() if word.startswith("class0")]
    assert names == [f"class{i:05d}" for i in (*range(20), *range(5000, 5020))]
    assert "13204 classes" in printed(table)


def test_up_to_a_hundred_classes_are_all_printed():
    truth = ground_truth((0, 0, 50, 50))
    truth["categories"] = [{"id": i, "name": f"class{i}"} for i in range(1, 101)]
    assert (
        printed(per_class_table(evaluate_detections(truth, []).bbox, "boxes")).count(" class") == 101
    )  # and the heading


def test_a_name_cannot_command_the_terminal_or_turn_the_writing():
    truth = ground_truth((0, 0, 50, 50))
    truth["categories"][1]["name"] = "\x1b[2J\u202egpj"
    assert "\\u001b[2J\\u202egpj" in printed(per_class_table(evaluate_detections(truth, []).bbox, "boxes"))
