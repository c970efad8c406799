"""For every source: its layout, and the truth written by hand: what becomes of each record, in messages and tokens.

Tokens of a sample are (n_patches, n_text_tokens, n_loss_tokens). By hand, with the Mistral tokenizer's pieces: every
picture is 2 patches and 2 marks; plain is BOS, marks and the words, and the assistant's words are loss; inst has BOS,
`[INST] words [/INST]` (7 pieces of markup) and one EOS for each answer, which is loss too.
"""

from dataclasses import dataclass, field
from typing import Any

import source_layouts as write

Said = list[tuple[str, list[str | None]]]  # role and contents, None is an image

TURNS_PLAIN = {"missing_image": 1, "bad_record": 1, "empty": 1, "duplicate_row": 1}
ORIGIN = {"origin": "origin", "origin_host": "images.example.test"}
FETCHED = {"http_404": 1, "empty": 1, "duplicate_row": 1}


@dataclass(frozen=True)
class Case:
    """A source's fixture and what the three parts must make of it."""

    write: write.Write
    dropped: dict[str, int]  # acquire's statuses other than ok
    kept: list[tuple[Said, tuple[int, int, int]]]
    args: dict[str, Any] = field(default_factory=dict)  # where the fixture's web is


def document(*content: str | None) -> Said:
    return [("assistant", list(content))]


def qa(*turns: str | None) -> Said:
    """User and assistant in turn, the picture in the first turn."""
    said: Said = [(("user", "assistant")[i % 2], [turn]) for i, turn in enumerate(turns)]
    said[0][1].insert(0, None)
    return said


def pairs(question: str, answer: str, tokens: tuple[int, int, int]) -> Case:
    said = qa(question, answer, "Où est-ce?", "東京")
    return Case(write.cauldron(question, answer), TURNS_PLAIN, [(said, tokens)])


SLIM = {"excluded_set": 2, "empty": 1, "bad_record": 1, "duplicate_row": 1}
PROOF = [(document("A naïve proof."), (0, 7, 6))]
ALLAVA = [
    (qa("\nDescribe.", "A café.", "Why?", "It rains."), (2, 16, 7)),
    (qa("\nWho?", "A cat."), (2, 10, 3)),
]
BUG = [(document(None, "Ein roter Käfer."), (2, 10, 7))]

CASES: dict[str, Case] = {
    "imagenet-21k": Case(
        write.imagenet,
        {"empty": 1, "no_label": 1, "missing_image": 1},
        [(document(None, "Sea Lion pup"), (2, 6, 3))],
    ),
    "slimpajama-1": Case(
        write.slimpajama("chunk1/example_train_12.jsonl.zst", "chunk1/example_train_5.jsonl.zst"), SLIM, PROOF
    ),
    "slimpajama-2": Case(
        write.slimpajama("chunk2/example_train_103.jsonl.zst", "chunk1/example_train_1.jsonl.zst"), SLIM, PROOF
    ),
    "slimpajama-3": Case(
        write.slimpajama("chunk3/example_train_17.jsonl.zst", "chunk3/example_train_1.jsonl.zst"), SLIM, PROOF
    ),
    "capsfusion": Case(
        write.url_list("capsfusion_1.parquet", "image_url", "capsfusion", laion_2b="x"), FETCHED, BUG, ORIGIN
    ),
    "websight": Case(
        write.websight,
        {"empty": 1, "missing_image": 2},
        [(document(None, "<html>\n<body>Hi</body></html>"), (2, 16, 13))],
    ),
    "cc3m": Case(
        write.cc3m,
        {"bad_record": 2, "missing_image": 1, "empty": 1},
        [(document(None, "a river by a café"), (2, 8, 5))],
    ),
    "detailed-captions": Case(
        write.detailed,
        {"missing_image": 1, "empty": 1, "bad_record": 1},
        [(document(None, "A cat — asleep."), (2, 8, 5))],
    ),
    "llavar": Case(
        write.llava(
            "chat_llavar.json",
            "pretrain.zip",
            "pretrain/GCC_train_1.jpg",
            [
                {"id": "1", "image": "GCC_train_1.jpg", "conversations": write.talk("Read.\n<image>", "SOLDÉ")},
                {"id": "2", "image": "GCC_train_002.jpg", "conversations": write.talk("<image>\nSay.", "a cup")},
                {"id": "3", "image": "GCC_train_1.jpg", "conversations": write.talk("<image>\nSay.", "")},
            ],
        ),
        {"missing_image": 1, "bad_record": 1},
        [([("user", ["Read.\n", None]), ("assistant", ["SOLDÉ"])], (2, 9, 3))],
    ),
    "dvqa": pairs("How many bars?\nAnswer:", "Two.", (2, 22, 5)),
    "ocr-vqa": pairs("Who wrote this book?", "Jane Doe.", (2, 21, 7)),
    "figure-qa": pairs("Is Red the minimum?", "No.", (2, 19, 5)),
    "allava-laion": Case(
        write.allava(
            "laion", "image_chunks/images_0.zip", "allava_laion/images/100277305.jpeg", "images/100277305.jpeg"
        ),
        {"missing_image": 1},
        ALLAVA,
    ),
    "allava-vflan": Case(
        write.allava(
            "vflan",
            "images/image_191-task_1k.zip",
            "allava_vflan/images/images_191task_1k/PACS+guitar_1.png",
            "images_191task_1k/PACS+guitar_1.png",
        ),
        {"missing_image": 1},
        ALLAVA,
    ),
    "cc12m": Case(write.url_list("0000.parquet", "image_url", "caption"), FETCHED, BUG, ORIGIN),
    "mmc4": Case(
        write.mmc4,
        {"missing_image": 2, "bad_record": 1, "empty": 1},
        [(document("One.", None, None, "Zwei Käfer."), (4, 13, 8))],
    ),
    "code-act-general": Case(
        write.messages_table("general-00000-of-00001.parquet", "conversations", id="general_0"),
        {"bad_record": 2, "empty": 1},
        [
            (
                [
                    ("system", ["Be brief."]),
                    ("user", ["Größe?"]),
                    ("assistant", ["Yes."]),
                    ("user", ["x"]),
                    ("assistant", ["No"]),
                ],
                (0, 30, 5),
            )
        ],
    ),
    "ultra-interact": Case(
        write.ultra_interact,
        {"empty": 1, "bad_record": 1},
        [([("user", ["2 + 2 = ?"]), ("assistant", ["4 €"])], (0, 19, 4))],
    ),
    "ultra-chat": Case(
        write.messages_table(
            "train_sft-00000-of-00003-a3ecf92756993583.parquet", "messages", prompt="Größe?", prompt_id="f0"
        ),
        {"bad_record": 2, "empty": 1},
        [
            (
                [
                    ("system", ["Be brief."]),
                    ("user", ["Größe?"]),
                    ("assistant", ["Yes."]),
                    ("user", ["x"]),
                    ("assistant", ["No"]),
                ],
                (0, 30, 5),
            )
        ],
    ),
    "lvis-instruct4v": Case(
        write.llava(
            "lvis_instruct4v_220k.json",
            "train2017.zip",
            "train2017/000000000009.jpg",
            [
                {
                    "id": "9",
                    "image": "coco/train2017/000000000009.jpg",
                    "conversations": write.talk("<image>\nWhat is it?", "Crème", "More?", "No."),
                },
                {
                    "id": "8",
                    "image": "coco/train2017/000000000008.jpg",
                    "conversations": write.talk("<image>\nA?", "B"),
                },
                {"id": "7", "image": "coco/train2017/000000000009.jpg", "conversations": write.talk("<image>\nA?")},
            ],
        ),
        {"missing_image": 1, "bad_record": 1},
        [(qa("\nWhat is it?", "Crème", "More?", "No."), (2, 29, 6))],
    ),
    "sharegpt4v": Case(
        write.llava(
            "sharegpt4v_instruct_gpt4-vision_cap100k.json",
            "images",
            "sam/images/sa_545504.jpg",
            [
                {
                    "id": "sa_545504",
                    "image": "sam/images/sa_545504.jpg",
                    "conversations": write.talk("What do you see?\n<image>", "A naïve drawing."),
                },
                {"id": "x", "image": "coco/train2017/1.jpg", "conversations": write.talk("<image>\nA?", "B")},
            ],
        ),
        {"missing_image": 1},
        [([("user", ["What do you see?\n", None]), ("assistant", ["A naïve drawing."])], (2, 22, 7))],
    ),
    "laion-gpt4v": Case(
        write.url_list("train-00000-of-00001.parquet", "link", "caption", message_id="1", timestamp="2023-11-17"),
        FETCHED,
        [(qa("Describe this image in detail.", "Ein roter Käfer."), (2, 24, 8))],
        ORIGIN,
    ),
    "localized-narratives": pairs("Describe the image.", "In this image we see grass.", (2, 39, 12)),
    "vsr": pairs("Is the caption true? The cat is on the mat.\nAnswer yes or no.", "Yes.", (2, 50, 7)),
    "tqa": pairs("What is A?\nChoices:\nA. crust\nB. core", "Answer: A", (2, 49, 8)),
    "science-qa": pairs("Lecture: Maps.\nQuestion: Which is north?\nChoices:\nA. up", "Answer: A.", (2, 55, 9)),
    "icon-qa": pairs("How many dots are there?\nChoices: 3, 5", "5.", (2, 48, 8)),
    "tab-mwp": pairs("How much is a hat? (Unit: $)", "12", (2, 42, 8)),
    "chart-qa": pairs("What is the value of the red bar?", "0.57.", (2, 43, 11)),
    "vis-text": pairs("Summarize the chart.", "Sales rise to 40 %.", (2, 41, 12)),
    "chart2text": pairs("What is the main idea of this graph?", "Fewer flights in 2020.", (2, 48, 16)),
    "dvqa-sft": pairs("How many bars?\nAnswer:", "Two.", (2, 38, 7)),
    "figure-qa-sft": pairs("Is Red the minimum?", "No.", (2, 35, 7)),
    "diagram-image-to-text": pairs("Dissect the diagram.", "Start leads to End.", (2, 38, 10)),
    "infographic-vqa": pairs("What share is urban?", "55%.", (2, 37, 9)),
    "st-vqa": pairs("What does the sign say?", "STOP", (2, 36, 7)),
    "text-caps": pairs("Give a short caption.", "A sign reads OPEN.", (2, 40, 11)),
    "text-vqa": pairs("What brand is it?", "Nokia.", (2, 37, 9)),
    "ocr-vqa-sft": pairs("Who wrote this book?", "Jane Doe.", (2, 37, 9)),
    "rendered-text": pairs("What is written?", "Hello (red)", (2, 36, 9)),
    "hateful-memes": pairs("Is it hateful? The text: 'hi'.", "No.", (2, 41, 7)),
    "ok-vqa": pairs("Which sport is this?", "Tennis.", (2, 36, 8)),
    "a-okvqa": pairs("What is he riding?\nChoices: horse, bike.", "Bike.\nRationale: It has wheels.", (2, 53, 16)),
    "tally-qa": pairs("How many dogs?", "3.", (2, 35, 8)),
    "visual7w": pairs("Where is it?\nChoices:\nA. Zoo.", "A", (2, 44, 6)),
    "coco-qa": pairs("What is on the table?", "Cake.", (2, 37, 8)),
    "vqa-v2": pairs("What color is it?", "red", (2, 34, 6)),
    "gqa": Case(
        write.llava(
            "llava_v1_5_mix665k.json",
            "images.zip",
            "images/2395640.jpg",
            [
                {
                    "id": "1",
                    "image": "gqa/images/2395640.jpg",
                    "conversations": write.talk("<image>\nLeft?", "Yes", "Up?", "No"),
                },
                {"id": "2", "image": "coco/train2017/1.jpg", "conversations": write.talk("<image>\nA?", "B")},
                {"id": "3", "conversations": write.talk("Text only", "é")},
                {"id": "4", "image": "gqa/images/9.jpg", "conversations": write.talk("<image>\nA?", "B")},
            ],
        ),
        {"excluded_set": 2, "missing_image": 1},
        [(qa("\nLeft?", "Yes", "Up?", "No"), (2, 25, 4))],
    ),
    "vlm-sft": Case(
        write.bundle,
        {"missing_image": 1, "bad_record": 1, "empty": 1},
        [
            (qa("Was ist das?", "Ein Hut", "Color?", "red"), (2, 29, 6)),
            (qa("Where?", "Here"), (2, 14, 2)),
            ([("user", ["Hi"]), ("assistant", ["Hello"])], (0, 11, 2)),
        ],
    ),
}
