#!/usr/bin/env bash
# The paper's run on one machine with 8 GPUs, as nbs/paper_run.md explains it. Not run by us.
# From the root of a clone: PATH=$PWD/.venv/bin:$PATH bash nbs/speedrun.sh
# A step that was stopped goes on when the script is started again.
set -euo pipefail
cd "$(dirname "$0")/.."

# everything here that others publish? (stops if not, and says where it is)
dera weights --check --paper

# small copies of the videos; audit them once by hand, as the page says
dera prepare ucf101=data/ucf101 data/ucf101-128 --size 128
dera prepare k600=data/k600 data/k600-128 --size 128

# the tokenizer
accelerate launch --multi_gpu --num_processes 8 -m dera.train_tokenizer --preset paper --data ucf101=data/ucf101-128 k600=data/k600-128 --out runs/paper

# tokens of all clips, then the two generators
accelerate launch --multi_gpu --num_processes 8 -m dera.train_ar --preset paper-ucf101 --tokenizer runs/paper/tokenizer --data ucf101=data/ucf101-128 --out runs/paper-ucf101
accelerate launch --multi_gpu --num_processes 8 -m dera.train_ar --preset paper-k600-fp --tokenizer runs/paper/tokenizer --data k600=data/k600-128 --out runs/paper-k600-fp

# clips to look at
dera generate --tokenizer runs/paper/tokenizer --generator runs/paper-ucf101/generator --classes Biking Archery --count 4 --guidance 1.25 --out runs/paper-clips

# the numbers
accelerate launch --multi_gpu --num_processes 8 -m dera evaluate --data ucf101=data/ucf101 --tokenizer runs/paper/tokenizer --protocol larp-rfvd --workers 8 --out runs/paper-rfvd
accelerate launch --multi_gpu --num_processes 8 -m dera evaluate --data ucf101=data/ucf101 --tokenizer runs/paper/tokenizer --protocol heldout --workers 8 --out runs/paper-heldout
accelerate launch --multi_gpu --num_processes 8 -m dera evaluate --data ucf101=data/ucf101 --tokenizer runs/paper/tokenizer --generator runs/paper-ucf101/generator --protocol larp-gfvd --workers 8 --out runs/paper-gfvd
accelerate launch --multi_gpu --num_processes 8 -m dera evaluate --data k600=data/k600 --tokenizer runs/paper/tokenizer --generator runs/paper-k600-fp/generator --protocol k600-fp --workers 8 --out runs/paper-prediction
