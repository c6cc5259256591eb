"""What a training step costs, measured: `make bench` writes the record of 04_one_gpu_budget.

Every measurement runs in a process of its own and leaves a JSON file in runs/bench; a second call goes on where the
first was stopped. Parts: the ledger against measured peaks, a model of Llama 2 7B's shape, and the contenders:
transformers' `Trainer` with PEFT as its documentation shows, TRL's `SFTTrainer`, and ours.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from llama_long_utils import budget, models, records
from llama_long_utils.documents import REPOSITORY
from llama_long_utils.memory import StepShape, ledger, random_llama, training_steps
from llama_long_utils.packing import TrainingSequence
from llama_long_utils.presets import Lora, load_preset
from llama_long_utils.rope import Scaling
from llama_long_utils.training import Techniques, TrainingSettings, keep_freed_memory, train

FOLDER = REPOSITORY / "runs" / "bench"
RANK = 16
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = Lora(rank=RANK, alpha=2 * RANK, target_modules=MODULES, train_norms=False, train_embeddings=False)
PLAIN = Techniques(recomputed_layers=0, tile=0, offload_checkpoints=False, optimizer="adamw_torch_fused")
