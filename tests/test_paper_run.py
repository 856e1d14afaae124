"""The page "The paper's run": its commands start on an imitation of both data sets and end at most
at missing weights; its hours are the arithmetic it names."""

import json
import re
import shlex

import pytest
import torch
from accelerate.commands.launch import launch_command_parser

from dera import train_ar, train_tokenizer
from dera.ar import Generator, GeneratorConfig
from dera.pocket import render, sample_factors, write_video
from dera.reproduce import LARP_HOURS, SACP_EXTRA
from dera.runtime.checkpoints import fingerprint
from dera.runtime.weights import PAPER_RUN, PUBLISHED
from dera.streams import DeRATokenizer, TokenizerConfig
from dera.tools import cli

PAGE = "nbs/paper_run.md"
SCRIPT = "nbs/speedrun.sh"
NEEDS_NOTHING = "weights", "audit", "prepare"
NODE = dict(NODE="0", FIRST="localhost")


def blocks(text):
    return re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)


def commands(text):
    "Lines of a shell text that start dera, alone or by accelerate."
    return [line for line in text.splitlines() if line.startswith(("dera ", "accelerate "))]


@pytest.fixture
def page(root):
    return (root / PAGE).read_text(encoding="utf-8")


def words_of(command):
    "Words after `dera`, and how many processes the command asks for."
    for name, value in NODE.items():
        command = command.replace(f"${name}", value)
    words = shlex.split(command)
    if words[0] == "dera":
        return words[1:], 1
    asked = launch_command_parser().parse_args(words[2:])
    assert words[:2] == ["accelerate", "launch"] and asked.module
    modules = {
        "dera.train_tokenizer": ["train-tokenizer"],
        "dera.train_ar": ["train-ar"],
        "dera": [],
    }
    return modules[asked.training_script] + asked.training_script_args, asked.num_processes


def write_ucf101(folder, clips):
    "Two classes, each with one video to train on and one to test with."
    names = ["Archery", "Biking"]
    lists = folder / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    (lists / "classInd.txt").write_text("1 Archery\n2 Biking\n")
    videos = []
    for name in names:
        for group in 1, 8:
            videos.append(f"{name}/v_{name}_g{group:02d}_c01.avi")
            (folder / "UCF-101" / name).mkdir(parents=True, exist_ok=True)
            write_video(folder / "UCF-101" / videos[-1], clips[len(videos) - 1])
    for split in 1, 2, 3:
        (lists / f"testlist0{split}.txt").write_text(f"{videos[0]}\n{videos[2]}\n")
        (lists / f"trainlist0{split}.txt").write_text(f"{videos[1]} 1\n{videos[3]} 2\n")


def write_k600(folder, clips):
    "Two classes, each with one video in train and one in val."
    (folder / "annotations").mkdir(parents=True)
    for number, split in enumerate(("train", "val")):
        (folder / split).mkdir()
        rows = ["label,youtube_id,time_start,time_end,split"]
        for label, name in enumerate(("abseiling", "air drumming")):
            video = f"video-{number}-{label}00"
            write_video(folder / split / f"{video}_000001_000011.mp4", clips[2 * number + label])
            rows.append(f"{name},{video},1,11,{split}")
        table = folder / "annotations" / f"kinetics-600_{split}.csv"
        table.write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "A clone's data folder with four videos of each set, and nothing else."
    root = tmp_path_factory.mktemp("paper")
    clips = render(sample_factors(8, seed=0), 16, 64)
    write_ucf101(root / "data/ucf101", clips[:4])
    write_k600(root / "data/k600", clips[4:])
    write_video(root / "clip.mp4", clips[0])
    return root


def no_hub(*_, **__):
    raise OSError("no Hub in tests")


@pytest.fixture
def typed(tree, monkeypatch, capsys):
    "Type a command of the page in that clone: (exit code, standard output, standard error)."
    monkeypatch.chdir(tree)
    monkeypatch.setenv("DERA_TEACHERS", str(tree / "teachers"))
    monkeypatch.setenv("DERA_I3D", str(tree / "i3d.pt"))
    monkeypatch.setattr("dera.runtime.weights.hf_hub_download", no_hub)
    monkeypatch.setenv("TORCH_HOME", str(tree / "torch"))

    def run(words):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


def refusal(code, out, err):
    "The one line that a command ends with."
    lines = [line for line in err.splitlines() if line.startswith("dera: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in out + err, (code, out, err)
    assert err.splitlines()[-1] == lines[0], err
    return lines[0]


def test_every_block_says_that_it_was_not_run(page):
    assert len(blocks(page)) >= 10
    for block in blocks(page):
        first, *rest = block.splitlines()
        assert first == "# not run" and commands(block) == rest, block


def test_the_script_is_the_page_for_eight_gpus(page, root):
    told = commands("\n".join(blocks(page)))
    script = commands((root / SCRIPT).read_text())
    assert script and set(script) <= set(told)
    assert [line for line in told if "--num_processes 8 " in line] == [
        line for line in script if line.startswith("accelerate")
    ]


def test_every_command_ends_at_missing_weights_and_nowhere_else(page, typed, tree):
    seen = {}
    for command in commands("\n".join(blocks(page))):
        words, processes = words_of(command)
        name = words[0]
        if name == "train-tokenizer":  # do they divide the batch? then one process stands for all
            options = train_tokenizer.TokenizerTraining.preset("paper", data=("x",))
            accumulate = int(words[words.index("--accumulate") + 1]) if processes == 1 else 1
            options.accumulate = accumulate
            train_tokenizer.check_training(options, processes)
        if name == "train-ar":
            preset = words[words.index("--preset") + 1]
            train_ar.check_run(train_ar.ARConfig.preset(preset), processes)
        key = tuple(words)
        if key in seen:  # the same words on more processes
            continue
        seen[key] = code, out, err = typed(words)
        if name == "weights":
            assert code == 1 and out.endswith("2 there, 4 missing\n"), out
        elif name in NEEDS_NOTHING:
            assert code == 0, (command, out, err)
        elif name == "train-tokenizer":
            line = refusal(code, out, err)
            for weights in "vit_base_patch16_dinov3.lvd1689m", "internvideo2-b14", "LPIPS-vgg":
                assert weights in line, (command, line)
        else:
            assert "no tokenizer in runs/paper/tokenizer" in refusal(code, out, err), command
    used = {words[0] for words in seen}
    assert used == {*NEEDS_NOTHING, "train-tokenizer", "train-ar", "generate", "evaluate"}
    protocols = {words[words.index("--protocol") + 1] for words in seen if words[0] == "evaluate"}
    assert protocols == {"larp-rfvd", "larp-gfvd", "heldout", "k600-fp"}


def stand_ins(runs):
    "Small untrained models of the paper's clips, where the page's trainings leave theirs."
    torch.manual_seed(0)
    shape = TokenizerConfig.preset(
        "paper", dim=48, heads=2, encoder_depth=1, decoder_depth=1, codebook_size=64
    )
    tokenizer = DeRATokenizer(shape).eval()
    tokenizer.save_pretrained(runs / "paper/tokenizer")
    common = dict(dim=32, depth=1, heads=2, vocab_size=64, num_tokens=tokenizer.num_codes)
    common["tokenizer"] = fingerprint(tokenizer)
    for name, more in (
        ("paper-ucf101", dict(num_classes=2)),
        ("paper-k600-fp", dict(num_classes=2, prefix_tokens=tokenizer.num_codes)),
    ):
        folder = runs / name
        Generator(GeneratorConfig(**common, **more)).eval().save_pretrained(folder / "generator")
        about = dict(classes=["Archery", "Biking"], condition_frames=5)
        (folder / "generator/training.json").write_text(json.dumps(about))


def test_after_the_trainings_evaluation_asks_for_i3d_by_itself(page, typed, tree):
    stand_ins(tree / "runs")
    done = 0
    for command in commands("\n".join(blocks(page))):
        words, processes = words_of(command)
        if processes > 1:
            continue
        if words[0] == "evaluate":
            line = refusal(*typed(words))
            assert "i3d" in line and str(tree / "i3d.pt") in line, command
            done += 1
        if words[0] == "generate":
            count = ["--count", "1"]  # 1,024 tokens each
            code, out, err = typed(words + count)
            assert code == 0, (command, err)
            done += 1
    assert done == 6


def test_the_list_of_weights_is_what_the_presets_use(page):
    paper = train_tokenizer.TokenizerTraining.preset("paper")
    used = {"ucf101", "k600", paper.image_teacher, paper.video_teacher, paper.perceptual, "i3d"}
    assert used == set(PAPER_RUN)
    for name in PAPER_RUN:
        entry = PUBLISHED[name]
        assert entry.source in page.replace("https://huggingface.co/", ""), name
        number = re.search(r"[\d.]+ [GM]B", entry.size)[0]
        assert number in page, name


def test_the_hours_of_the_page_are_its_arithmetic(page, root):
    rows = json.loads((root / "nbs/results/bench-train-cpu.json").read_text())["rows"]
    (clip,) = (row["teraflop"] for row in rows if row["part"] == "step")
    steps = 75 * ((9_537 + 392_622) // 128)
    assert f"{clip:.2f} TFLOP" in page and f"{steps:,} steps" in page

    def cells(teraflop, steps, gigabytes):
        "Hours on 1, 8 and 64 cards at 30 % of 989 TFLOPS, and at 40 and 20 %."
        for cards, bandwidth in (1, None), (8, 450), (64, 50):
            waiting = 2 * (cards - 1) / cards * gigabytes / bandwidth if bandwidth else 0
            yield [
                round((teraflop / (cards * 989 * share) + steps * waiting) / 3600)
                for share in (0.3, 0.4, 0.2)
            ]

    def attention_and_matrices(tokens):
        return (6 * 632e6 * tokens + 12 * tokens**2 * 1280 * 30) / 1e12

    for title, teraflop, number, gigabytes in (
        ("tokenizer, by operations", steps * 128 * clip, steps, 1.4),
        ("generator, UCF-101", 3000 * 9537 * attention_and_matrices(1025), 3000 * 9537 / 64, 2.53),
        (
            "generator, frame prediction",
            75 * 392_622 * attention_and_matrices(2049),
            75 * 392_622 / 64,
            2.53,
        ),
    ):
        row = re.search(rf"^\| {title} \|(.*)$", page, re.M)[1]
        wanted = [f"{h} h ({low} to {high})" for h, low, high in cells(teraflop, number, gigabytes)]
        assert [cell.strip() for cell in row.split("|")[:3]] == wanted, title
    hours = LARP_HOURS / 2 * (1 + SACP_EXTRA)
    row = re.search(r"^\| tokenizer, by LARP \|(.*)$", page, re.M)[1]
    assert [cell.strip() for cell in row.split("|")[:3]] == [
        f"{h:.0f} h" for h in (8 * hours, hours, hours / 8)
    ]


def test_what_was_measured_stands_on_the_page(page, root):
    measured = {}
    for clips in 8, 16, 32:
        file = root / f"nbs/results/bench-train-gpu-{clips}.json"
        rows = {row["part"]: row for row in json.loads(file.read_text())["rows"]}
        measured[clips] = rows["step"]
        assert f"{rows['step']['gigabytes']:.1f} GB with {clips}" in page
    rate = measured[16]["clips_per_second"]
    hours = 75 * (9_537 + 392_622) / rate / 3600
    row = re.search(r"^\| tokenizer, by a measured step \|(.*)$", page, re.M)[1]
    assert [cell.strip() for cell in row.split("|")[:2]] == [f"{hours:.0f} h", f"{hours / 8:.0f} h"]
    assert f"{rate:.1f} clips a second" in page
