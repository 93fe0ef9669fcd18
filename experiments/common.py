"""What the experiments share: every key of a run, with its meaning.

`base()` is online DPO in the tiny world; an experiment's file sets what is different there. Any key can be set on the
command line: --config.loss.beta=0.3. There are no None and no lists, which couldn't be.
"""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """All keys of oaif_jax.config.Config; not locked, so that a file may change it and lock it."""
    return ConfigDict(
        {
            "method": "online",  # online, offline (fixed pairs), sft (references), annotator (pairs with answers)
            "seed": 0,  # of what is random in the run: a policy from scratch, the order of the posts, samples
            "steps": 240,  # updates of the policy
            "async_steps": 0,  # online: 1 collects pairs a step ahead, with parameters that are a step old
            "rounds": {"count": 1, "lr": "", "portions": False},
            "loss": loss(),
            "policy": policy(),
            "reference": reference(),
            "annotator": annotator(),
            "judge": judge(),
            "data": data(),
            "sample": sample(),
            "optimizer": optimizer(),
            "mesh": mesh(),
            "compute": compute(),
            "eval": evaluation(),
            "checkpoint": checkpoint(),
            "export": export(),
            "log": log(),
        }
    )


def loss() -> dict:
    """The preference loss."""
    return {
        "name": "dpo",  # dpo, ipo (summed log-ratios), ipo_mean (per token), slic
        "beta": 0.1,  # the loss's own: dpo and ipo about 0.1, slic about 0.002
    }


def policy() -> dict:
    """The model that is trained."""
    return {
        "init": "tiny:sft",  # tiny:NAME (an asset), hf (path), scratch (shape), WORKDIR[@best | @last | @STEP] (a run)
        "path": "",  # hf: a directory with config.json, *.safetensors and the tokenizer's files
        "chat": "auto",  # hf: auto (the tokenizer's own chat template), none (plain text), or a .jinja file
        "shape": {  # of a model from scratch; others bring their own
            "width": 96,  # of the residual stream
            "layers": 3,  # blocks of attention and mlp
            "heads": 4,  # query heads
            "kv_heads": 4,  # key/value heads, of which `heads` is a multiple
            "head_dim": 24,  # width of a head, even
            "mlp": 288,  # width inside the gated mlp
        },
        "lora": lora(),
        "quant": "none",  # of the frozen base under LoRA: none, int8, nf4
    }


def lora() -> dict:
    """Low-rank additions, trained in place of the parameters; the base is then the reference."""
    return {
        "rank": 0,  # 0: off, all parameters are trained
        "alpha": 16.0,  # the additions are scaled by alpha / rank
        "targets": "q,k,v,out,gate,up,down",  # the projections that get one
    }


def reference() -> dict:
    """The fixed model that the policy is kept near to and compared with."""
    return {
        "init": "policy",  # policy (a copy of its start), or as policy.init
        "path": "",  # as policy.path
    }


def annotator() -> dict:
    """The language model that prefers one of two responses (online)."""
    return {
        "init": "tiny:annotator",  # as policy.init
        "path": "",  # as policy.path; its tokenizer may be another than the policy's
        "chat": "auto",  # as policy.chat
        "quant": "none",  # none, int8, nf4
        "instruction": "helpful",  # tiny: helpful, short, very_short; else see annotators/instructions; or a path
        "question_tokens": 0,  # limit of instruction and prompt together; 0: the longest that there is
        "missing_eos": "loses",  # loses (a response cut at the limit loses against a finished one), ignore
    }


def judge() -> dict:
    """The language model that compares the policy with the reference in evaluations."""
    return {
        "init": "tiny:judge",  # as policy.init, annotator (the same model), or none; tiny's was trained apart
        "path": "",  # as policy.path
        "chat": "auto",  # as policy.chat
        "instruction": "helpful",  # as annotator.instruction
    }


def data() -> dict:
    """The posts."""
    return {
        # Files at `path`: prompts, references, pairs (your own JSON lines), tldr_posts, tldr_comparisons, hh,
        # ultrafeedback (as distributed), tfds (what `python -m oaif_jax.data prepare` wrote).
        "name": "tiny",  # tiny (the embedded world), or the form of the files at `path`, see above
        "path": "",  # a file, or a directory in the data set's own layout
        "train": "",  # files: name of the split to train on, where path is a directory
        "validation": "",  # files: name of the split to validate on; "": held out from train
        "test": "",  # files: name of the split for the end; "": held out from train
        "held_out": 256,  # files: examples held out for each of these two
        "on_error": "raise",  # a line that can't be read: raise, skip (and count)
        "seed": 0,  # of the posts and their order
        "train_posts": 20000,  # posts of the training split, seen in a new order each epoch; 0: all there are
        "batch": 32,  # posts, pairs or references a step, over all devices
        "prompt_tokens": 56,  # limit of a prompt; longer ones are refused
        "response_tokens": 16,  # limit of a response, with its end
        "writer": "reference",  # sft: who wrote the references: reference, careless, careful
        "pairs": "tiny:pairs",  # offline: tiny:NAME (an asset), or a path to JSONL
    }


def sample() -> dict:
    """How responses are drawn, in training and in evaluation."""
    return {
        "temperature": 0.9,  # 0: greedy
        "top_k": 0,  # most likely tokens kept; 0: all
        "top_p": 1.0,  # probability mass kept; 1: all
    }


def optimizer() -> dict:
    """The optimizer and its schedule."""
    return {
        "name": "adamw",  # adamw, adafactor
        "lr": 5e-4,  # after the warm-up
        "schedule": "linear",  # constant, linear, cosine (the last two end at 0 after `steps`)
        "warmup": 10,  # steps from lr 0 to lr
        "clip": 1.0,  # largest norm of the gradient; 0: off
        "b1": 0.9,  # adamw's decay of the first moment
        "b2": 0.99,  # adamw's decay of the second moment
        "eps": 1e-8,  # adamw's, added to the root of the second moment
        "weight_decay": 0.0,  # decoupled; a step in which no pair counts doesn't decay
        "scale_by_parameters": False,  # adafactor: updates relative to the parameter's RMS
        "moments": "float32",  # type of adamw's first moment: float32, bfloat16
        "accumulate": 1,  # micro-batches a step, each data.batch / accumulate
    }


def mesh() -> dict:
    """Devices along each axis; their product is the number of devices."""
    return {
        "cpu_devices": 2,  # without accelerators: the CPU is made this many devices; 0: left as it is
        "data": -1,  # copies of the parameters, over which the batch is split; -1: what is left
        "fsdp": 1,  # parts of each parameter, over which the batch is split as well
        "tensor": 1,  # parts of heads, mlp and vocabulary
    }


def compute() -> dict:
    """Types and memory of the computation; results agree to rounding."""
    return {
        "dtype": "float32",  # of activations and matrix products: float32 (CPU), bfloat16 (accelerators)
        "trained": "float32",  # of trained parameters; a bfloat16 one doesn't move at small learning rates
        "frozen": "float32",  # of reference, annotator and judge: float32 (CPU), bfloat16 (accelerators)
        "remat": "none",  # computed again in the backward pass: none, dots (all but products with weights), layer (all)
        "attention": "parts",  # by parts in XLA's products: parts; by a kernel: cudnn (GPUs, no soft cap), splash (TPUs)
        "decode": "unrolled",  # layers in the token loop: unrolled (faster on CPU, slower to compile) or scanned
        "lengths": 1,  # online: annotate and update at 1 to 3 widths (R, R/2, R/4) by the longest response; slower to compile
        "head_chunk": 1024,  # tokens whose logits exist at a time
    }


def evaluation() -> dict:
    """Evaluation on held-out posts, policy against reference."""
    return {
        "every": 40,  # steps; a multiple of checkpoint.every
        "prompts": 128,  # validation posts
        "final_prompts": 256,  # posts at the end
        "final_split": "test",  # split of the posts at the end: test, validation (for tuning)
        "final": "best",  # parameters at the end: best (by the next key), last
        "best": "judge.score",  # judge.score, gold.score (higher is better), validation_loss (lower)
    }


def checkpoint() -> dict:
    """Checkpoints, from which a run goes on when started again."""
    return {
        "every": 20,  # steps between them
        "keep": 2,  # last ones kept, beside the best
    }


def export() -> dict:
    """What the run leaves for other programs."""
    return {
        "at_end": False,  # write WORKDIR/export, which transformers loads (policy.init=hf)
        "dtype": "bfloat16",  # of what is exported: bfloat16, float32
    }


def log() -> dict:
    """Training metrics."""
    return {
        "every": 1,  # steps between lines of metrics.jsonl
    }
