"""Small sets in the formats that others publish, a function each.

A function writes a set into a folder and returns how to import it and what must come of it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import tarfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SOURCE, REFERENCE = "source", "reference"


@dataclasses.dataclass
class Made:
    """How to import a set, and its examples: (instruction, target, ((role, picture), ...))."""

    task: str
    job: dict[str, Any]
    examples: list[tuple[str, bytes, tuple[tuple[str, bytes], ...]]]


def picture(number: int, form: str = "JPEG", size: tuple[int, int] = (40, 24)) -> bytes:
    """A file with a picture of its own."""
    buffer = io.BytesIO()
    image = Image.new("RGB", size, (number * 37 % 256, number * 11 % 256, number % 256))
    image.putpixel((number % size[0], number // size[0] % size[1]), (255, 255, 255))
    image.save(buffer, form)
    return buffer.getvalue()


def put(folder: pathlib.Path, name: str, data: bytes | str) -> str:
    """Writes a file below a folder; returns its path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def tar(path: pathlib.Path, members: list[tuple[str, bytes]], packed: bool = False) -> str:
    """A tar archive with these members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if packed else "w") as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return str(path)


def cut(path: str, parts: int, name: str) -> list[str]:
    """Replaces a file by parts of it, `name` with their number behind."""
    data, found = pathlib.Path(path).read_bytes(), []
    step = -(-len(data) // parts)
    for number in range(parts):
        part = pathlib.Path(f"{path}{name}{number:03d}")
        part.write_bytes(data[number * step : (number + 1) * step])
        found.append(str(part))
    pathlib.Path(path).unlink()
    return found


def edits(count: int = 5) -> list[tuple[str, bytes, tuple[tuple[str, bytes], ...]]]:
    """Edits of one source picture each."""
    return [
        (f"make {n} greener", picture(2 * n, "PNG"), ((SOURCE, picture(2 * n + 1)),))
        for n in range(count)
    ]


def captions(count: int = 5) -> list[tuple[str, bytes, tuple[tuple[str, bytes], ...]]]:
    return [(f"a thing, number {n} ü", picture(n), ()) for n in range(count)]


def folder_of_captions(folder):
    for text, data, _ in (found := captions()):
        put(folder, f"deep/{text[-3]}.jpg", data)
        put(folder, f"deep/{text[-3]}.txt", f"{text}\n")
    return Made("text_to_image", {"format": "folder", "inputs": (str(folder),)}, found)


def folder_of_metadata(folder):
    found = [
        *edits(),
        ("one of each", picture(90), ((SOURCE, picture(91)), (REFERENCE, picture(92)))),
    ]
    rows = []
    for n, (text, target, pictures) in enumerate(found):
        put(folder, f"train/{n}.png", target)
        row: dict[str, Any] = {"file_name": f"{n}.png", "text": text}
        for role, data in pictures:
            put(folder, f"train/{role}/{n}.jpg", data)
            named = f"{role}/{n}.jpg"
            row |= {"source": named} if role == SOURCE else {"references": [named]}
        rows.append(row)
    put(folder, "train/metadata.jsonl", lines(rows))
    return Made("editing", {"format": "folder", "inputs": (str(folder),)}, found)


def folder_of_csv(folder):
    rows = ["file_name,text"]
    for n, (text, data, _) in enumerate(found := captions()):
        put(folder, f"{n}.jpg", data)
        rows.append(f'{n}.jpg,"{text}"')
    put(folder, "metadata.csv", "\r\n".join(rows))
    return Made("text_to_image", {"format": "folder", "inputs": (str(folder),)}, found)


def webdataset(folder):
    found = captions(7)
    for name, part, ending in (
        ("00000.tar", found[:4], "txt"),
        ("00001.tar.gz", found[4:], "json"),
    ):
        members = []
        for n, (text, data, _) in enumerate(part):
            body = text if ending == "txt" else json.dumps({"prompt": text})
            members += [
                (f"{name[:5]}{n:04d}.jpg", data),
                (f"{name[:5]}{n:04d}.{ending}", body.encode()),
            ]
        tar(folder / name, members, packed=name.endswith("gz"))
    return Made("text_to_image", {"format": "webdataset", "inputs": (str(folder),)}, found)


def table(path: pathlib.Path, rows: list[dict[str, Any]], group: int = 2) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return str(path)


def struct(data: bytes) -> dict[str, Any]:
    """A picture as Hugging Face's `Image` feature keeps it."""
    return {"bytes": data, "path": None}


def parquet(folder):
    found = captions()
    rows = [{"words": text, "img": struct(data)} for text, data, _ in found]
    table(folder / "data" / "train-00000-of-00001.parquet", rows)
    columns = {"text": "words", "target": "img"}
    return Made(
        "text_to_image", {"format": "parquet", "inputs": (str(folder),), "columns": columns}, found
    )


def arrow(folder):
    """As `datasets` saves a set: an Arrow stream."""
    found = captions()
    rows = pa.Table.from_pylist([{"text": x[0], "image": struct(x[1])} for x in found])
    folder.mkdir()
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), rows.schema) as out:
        out.write_table(rows)
    return Made("text_to_image", {"format": "parquet", "inputs": (str(folder),)}, found)


def llava(folder):
    rows = []
    for n, (text, data, _) in enumerate(found := captions()):
        put(folder, f"images/{n}.jpg", data)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": text}]
        rows.append({"id": f"row {n}", "image": f"{n}.jpg", "conversations": turns})
    path = put(folder, "list.json", json.dumps(rows, indent=1))
    given = {"format": "llava", "inputs": (path,), "images": (str(folder / "images"),)}
    return Made("text_to_image", given, found)


def gpt_image_edit(folder):
    rows = []
    for n, (text, target, ((_, source),)) in enumerate(found := edits()):
        put(folder, f"hqedit/edit/in_{n}.jpg", source)
        put(folder, f"hqedit/edit/out_{n}.png", target)
        turns = [
            {"from": "human", "value": f"<image>\n{text}"},
            {"from": "gpt", "value": "<image>"},
        ]
        rows.append({"image": [f"in_{n}.jpg", f"out_{n}.png"], "conversations": turns})
    path = put(folder, "training_json/hqedit.json", json.dumps(rows))
    given = {
        "format": "gpt_image_edit",
        "inputs": (path,),
        "images": (str(folder / "hqedit/edit"),),
    }
    return Made("editing", given, found)


def sharegpt4o_image(folder):
    rows, members = [], []
    for n, (text, target, ((_, source),)) in enumerate(found := edits()):
        rows.append(
            {
                "input_prompt": text,
                "input_image": [f"image/in_{n}.jpg"],
                "output_image": f"image/v2v_{n}.png",
            }
        )
        members += [(f"image/in_{n}.jpg", source), (f"image/v2v_{n}.png", target)]
    path = put(folder, "text_and_image_to_image.json", json.dumps(rows))
    names = [tar(folder / f"text_and_image_to_image_part_{n}.tar", members[n::2]) for n in range(2)]
    given = {"format": "sharegpt4o_image", "inputs": (path,), "images": tuple(names)}
    return Made("editing", given, found)


def imgedit(folder):
    """One turn in one table, two turns in another; the pictures in a tar that is split."""
    single, multi, members = [], [], []
    for n, (text, target, ((_, source),)) in enumerate(found := edits()):
        members += [(f"s/{n}_in.jpg", source), (f"s/{n}_out.png", target)]
        single.append(
            {"prompt": text, "input_images": [f"s/{n}_in.jpg"], "output_images": [f"s/{n}_out.png"]}
        )
    chain = [picture(100 + n) for n in range(3)]
    members += [(f"m/{n}.jpg", data) for n, data in enumerate(chain)]
    turns = [
        {"prompt": f"turn {n}", "input_images": [f"m/{n}.jpg"], "output_images": [f"m/{n + 1}.jpg"]}
        for n in range(2)
    ]
    multi.append({"data": turns})
    found += [(f"turn {n}", chain[n + 1], ((SOURCE, chain[n]),)) for n in range(2)]
    paths = table(folder / "a_single.parquet", single), table(folder / "b_multi.parquet", multi)
    parts = cut(tar(folder / "Singleturn" / "add.tar", members), 3, ".split.")
    return Made("editing", {"format": "imgedit", "inputs": paths, "images": tuple(parts)}, found)


def seed_edit(folder):
    chain = [picture(100 + n) for n in range(3)]
    row = {"source_image": "c0.jpg"}
    for n, data in enumerate(chain):
        put(folder, f"images/c{n}.jpg", data)
        if n:
            row |= {f"instruction_{n}": f"step {n}", f"edit_image_{n}": f"c{n}.jpg"}
    found = [(f"step {n}", chain[n], ((SOURCE, chain[n - 1]),)) for n in (1, 2)]
    put(folder, "annotations/split_0.jsonl", lines([row]))
    rows = []
    for n, (text, target, ((_, source),)) in enumerate(edits()):
        put(folder, f"images/{n}_in.jpg", source)
        put(folder, f"images/{n}_out.png", target)
        rows.append(
            {"source_image": f"{n}_in.jpg", "target_image": f"{n}_out.png", "instruction": text}
        )
    put(folder, "annotations/split_1.jsonl", lines(rows))
    given = {"inputs": (str(folder / "annotations"),), "images": (str(folder / "images"),)}
    return Made("editing", {"format": "seed_edit", **given}, [*found, *edits()])


def _edits_in_tables(form, text, source, target, words=lambda text: text, **more):
    def make(folder):
        found = edits()
        rows = [
            {text: words(t), target: struct(after), source: struct(before), "unread": 1.5, **more}
            for t, after, ((_, before),) in found
        ]
        table(folder / "data" / "train-00000-of-00001.parquet", rows)
        return Made("editing", {"format": form, "inputs": (str(folder),)}, found)

    return make


nhr_edit = _edits_in_tables("nhr_edit", "edit_instruction", "source_image", "edited_image")
ultraedit = _edits_in_tables("ultraedit", "edit_prompt", "source_image", "edited_image")
omniedit = _edits_in_tables(
    "omniedit", "edited_prompt_list", "src_img", "edited_img", lambda text: ["short", text],
    omni_edit_id="task_1",
)  # fmt: skip


def x2i(folder):
    found, rows = [], []
    for n in range(3):
        pictures = [picture(10 * n + k) for k in range(2)]
        names = [put(folder, f"in/{n}_{k}.jpg", data) for k, data in enumerate(pictures)]
        put(folder, f"out/{n}.jpg", target := picture(10 * n + 5))
        slots = "The man in <img><|image_1|></img> holds <img><|image_2|></img>."
        rows.append(
            {"task_type": "subject", "instruction": slots,
             "input_images": [name.removeprefix(f"{folder}/") for name in names],
             "output_image": f"out/{n}.jpg"}
        )  # fmt: skip
        text = "The man in image 1 holds image 2 ."
        found.append((text, target, tuple((REFERENCE, data) for data in pictures)))
    path = put(folder, "subset.jsonl", lines(rows))
    return Made(
        "composition", {"format": "x2i", "inputs": (path,), "images": (str(folder),)}, found
    )


def metaquery_instruct(folder):
    found, rows = [], []
    for n in range(3):
        pictures = [picture(10 * n + k) for k in range(3)]
        rows.append(
            {"source_images": [struct(x) for x in pictures[:2]], "prompt": f"both, {n}",
             "target_image": struct(pictures[2])}
        )  # fmt: skip
        found.append((f"both, {n}", pictures[2], tuple((REFERENCE, x) for x in pictures[:2])))
    table(folder / "a.parquet", rows)
    return Made("composition", {"format": "metaquery_instruct", "inputs": (str(folder),)}, found)


def uno(folder):
    """Two of three pass the filter."""
    found, rows = [], []
    for n, score in enumerate((4.0, 3.0, 3.5)):
        one, two = picture(2 * n), picture(2 * n + 1)
        names = [f"split1/{n}_{k}_40x24.png" for k in (1, 2)]
        put(folder, f"images/{names[0]}", one)
        put(folder, f"images/{names[1]}", two)
        caption = {
            "img_path1": "no",
            "img_path2": f"a cup, {n}",
            "judgment": "same",
            "subject": ["cup"],
        }
        rows.append(
            {"img_path1": names[0], "img_path2": names[1], "caption": caption,
             "vlm_filter_cot": {"score_part": {"shape": 4}, "score_final": score}}
        )  # fmt: skip
        if score >= 3.5:
            found.append((f"a cup, {n}", two, ((REFERENCE, one),)))
    path = put(folder, "labels/split1.json", json.dumps(rows))
    given = {"format": "uno", "inputs": (path,), "images": (str(folder / "images"),)}
    return Made("customization", given, found)


def musubi(folder):
    """Control pictures NAME_0, NAME_1 in one folder."""
    found = []
    for n in range(3):
        before = [picture(10 * n), picture(10 * n + 1)]
        put(folder, f"images/im{n}.png", target := picture(10 * n + 2, "PNG"))
        put(folder, f"images/im{n}.txt", f"both of {n}")
        for k, data in enumerate(before):
            put(folder, f"control/im{n}_{k}.jpg", data)
        roles = zip((SOURCE, REFERENCE), before, strict=True)
        found.append((f"both of {n}", target, tuple(roles)))
    given = {"inputs": (str(folder / "images"),), "control": (str(folder / "control"),)}
    return Made("editing", {"format": "musubi", **given}, found)


def musubi_list(folder):
    """JSON lines with paths from the root of the disk."""
    found, rows = edits(), []
    for n, (text, target, ((_, source),)) in enumerate(found):
        rows.append(
            {"image_path": put(folder, f"images/{n}.png", target), "caption": text,
             "control_path": put(folder, f"control/{n}.jpg", source)}
        )  # fmt: skip
    path = put(folder, "list.jsonl", lines(rows))
    return Made("editing", {"format": "musubi", "inputs": (path,)}, found)


def ai_toolkit(folder):
    """Two folders of control pictures with the names of the targets, one inside the folder."""
    found = []
    for n in range(3):
        before = [picture(10 * n), picture(10 * n + 1)]
        put(folder, f"{n}.png", target := picture(10 * n + 2, "PNG"))
        put(folder, f"{n}.txt", f"both of {n}")
        for name, data in zip(("control_1", "control_2"), before, strict=True):
            put(folder, f"{name}/{n}.jpg", data)
        roles = zip((SOURCE, REFERENCE), before, strict=True)
        found.append((f"both of {n}", target, tuple(roles)))
    control = tuple(str(folder / name) for name in ("control_1", "control_2"))
    return Made(
        "editing", {"format": "ai_toolkit", "inputs": (str(folder),), "control": control}, found
    )


def csv_list(folder):
    rows = ["picture,says"]
    for n, (text, data, _) in enumerate(found := captions()):
        put(folder, f"{n}.jpg", data)
        rows.append(f'{n}.jpg,"{text}"')
    path = put(folder, "all.csv", "\n".join(rows))
    columns = {"text": "says", "target": "picture"}
    return Made("text_to_image", {"format": "list", "inputs": (path,), "columns": columns}, found)


# Subjects200K and TensorFlow data sets keep no bytes of a file: they have tests of their own.
SETS = {
    make.__name__ if make.__name__ != "make" else name: make
    for name, make in (
        ("folder_of_captions", folder_of_captions), ("folder_of_metadata", folder_of_metadata),
        ("folder_of_csv", folder_of_csv), ("webdataset", webdataset), ("parquet", parquet),
        ("arrow", arrow), ("csv_list", csv_list), ("llava", llava),
        ("gpt_image_edit", gpt_image_edit), ("sharegpt4o_image", sharegpt4o_image),
        ("imgedit", imgedit), ("seed_edit", seed_edit), ("nhr_edit", nhr_edit),
        ("ultraedit", ultraedit), ("omniedit", omniedit), ("x2i", x2i),
        ("metaquery_instruct", metaquery_instruct), ("uno", uno), ("musubi", musubi),
        ("musubi_list", musubi_list), ("ai_toolkit", ai_toolkit),
    )
}  # fmt: skip
