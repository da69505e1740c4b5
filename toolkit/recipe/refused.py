"""Fields that the installed libraries accept and a recipe may not hold, each with its reason and where it goes.

Three kinds: the toolkit sets the field itself; the library ignores it in the way it is used here; or it breaks what the
toolkit promises. A field that is only ignored beside certain others is judged in `trainer_rules` and `lora_rules`.
"""

_NO_METRICS = "it is for a compute_metrics function, which the toolkit passes none of, so it is ignored; remove it"
_NO_LENGTHS = "the toolkit prepares the data itself, and knows its lengths; remove it"

OWNED_BY_TOOLKIT = {
    "output_dir": "use --output",
    "overwrite_output_dir": "use --fresh",
    "resume_from_checkpoint": "an interrupted stage resumes by itself",
    "save_only_model": "an interrupted stage resumes with its optimizer's states too",
    "enable_jit_checkpoint": "the toolkit writes a checkpoint on SIGTERM and SIGINT by itself",
    "seed": "set seed at the top of the recipe",
    "model_init_kwargs": "use the recipe's model section",
    "trust_remote_code": "set model.trust_remote_code",
    "chat_template_path": "set model.chat_template",
    "eos_token": "the tokenizer's own end token is used; set model.chat_template",
    "pad_token": "the tokenizer's own padding token is used",
    "dataset_text_field": "use columns: {text: ...} in the data source",
    "dataset_kwargs": "the toolkit prepares the data itself",
    "remove_unused_columns": "the toolkit prepares the data itself",
    "label_names": "the toolkit prepares the data itself",
    "disable_tqdm": "progress is live on a terminal and plain lines elsewhere",
    "precompute_ref_log_probs": "the toolkit decides where reference log-probs come from",
    "precompute_ref_batch_size": "the toolkit decides where reference log-probs come from",
    "do_train": "stages are trained",
    "do_eval": "give the stage eval_data",
    "do_predict": "use the evaluate section",
    "push_to_hub": "use the hub section",
    "hub_model_id": "use the hub section",
    "hub_token": "run `hf auth login`, or set HF_TOKEN; a token never belongs in a recipe",
    "hub_strategy": "use the hub section",
    "hub_private_repo": "use the hub section",
    "hub_always_push": "use the hub section",
    "hub_revision": "use the hub section",
    "local_rank": "hardware never enters a recipe; use accelerate launch",
    "use_cpu": "hardware never enters a recipe; use accelerate launch --cpu",
    "fsdp": "hardware never enters a recipe; use an accelerate config file",
    "fsdp_config": "hardware never enters a recipe; use an accelerate config file",
    "ddp_timeout": "the toolkit lets processes wait for hours, as the main one tokenizes and verifies for all",
    "ddp_backend": "hardware never enters a recipe; accelerate chooses it",
    "deepspeed": "hardware never enters a recipe; use an accelerate config file",
    "parallelism_config": "hardware never enters a recipe; use an accelerate config file",
    "include_for_metrics": _NO_METRICS,
    "batch_eval_metrics": _NO_METRICS,
    "eval_do_concat_batches": _NO_METRICS,
    "eval_use_gather_object": _NO_METRICS,
    "eval_accumulation_steps": _NO_METRICS,
    "prediction_loss_only": _NO_METRICS,
    "length_column_name": _NO_LENGTHS,
    "use_cache": "TRL runs every training pass without a cache, so it is ignored; remove it",
    "fp16_full_eval": "transformers casts for evaluation outside of training only, and a stage evaluates inside",
    "bf16_full_eval": "transformers casts for evaluation outside of training only, and a stage evaluates inside",
    "restore_callback_states_from_checkpoint": "the toolkit's callbacks keep no state, so there is nothing to restore",
}
REFUSED_IN_SFT: dict[str, str] = {}
REFUSED_IN_DPO = {
    "padding_free": "DPOConfig accepts it and TRL ignores it; remove it",
    "sync_ref_model": "the reference is the frozen start of the stage; TRL cannot move it under LoRA; remove it",
    "ref_model_mixup_alpha": "it is for sync_ref_model, which TRL does not support under LoRA; remove it",
    "ref_model_sync_steps": "it is for sync_ref_model, which TRL does not support under LoRA; remove it",
    "truncation_mode": "only keep_start, its default, leaves the shared prompt in place; remove it",
    "label_smoothing_factor": "DPOTrainer computes its own loss and ignores it; DPO's is label_smoothing",
    "average_tokens_across_devices": "DPO's loss is a mean over pairs, so DPOTrainer ignores it; remove it",
}

LORA_OWNED = {
    "task_type": "it is CAUSAL_LM",
    "peft_type": "it is LORA",
    "auto_mapping": "PEFT sets it",
    "peft_version": "PEFT sets it",
    "base_model_name_or_path": "set model.name_or_path",
    "revision": "set model.revision",
    "inference_mode": "the toolkit sets it",
    "runtime_config": "PEFT reads it from Python objects only",
}
_REPLACES_BASE = "it changes the base, so `adapter off` is no longer the base that the reference needs"
_OWN_LOSS = "it adds a loss of its own, which TRL does not compute"
LORA_REFUSED = LORA_OWNED | {
    "loftq_config": "it is for init_lora_weights: loftq, which rewrites the base weights",
    "eva_config": "it is for init_lora_weights: eva, which needs a pass over the data that the toolkit does not make",
    "corda_config": "it is for init_lora_weights: corda, which rewrites the base weights",
    "lora_ga_config": "it is for init_lora_weights: lora_ga, which rewrites the base weights",
    "layer_replication": _REPLACES_BASE,
    "kasa_config": _REPLACES_BASE,
    "monteclora_config": _OWN_LOSS,
    "use_bdlora": "block-diagonal matrices are no plain LoRA, which is what a run hands back",
    "velora_config": "it trains a variant whose matrices the toolkit has not proven",
    "arrow_config": "it routes between finished adapters, and trains none",
    "use_qalora": "it is for GPTQ weights; on the weights that the toolkit loads PEFT ignores it",
    "qalora_group_size": "it is for GPTQ weights; on the weights that the toolkit loads PEFT ignores it",
    "megatron_config": "it is for Megatron's layers; on transformers' models PEFT ignores it",
    "megatron_core": "it is for Megatron's layers; on transformers' models PEFT ignores it",
}

# Names that other versions, or other tools with nearly the same fields, use for something a recipe can say.
OTHER_NAMES = {
    "evaluation_strategy": "it is eval_strategy now",
    "warmup_ratio": "transformers 5 has warmup_steps alone, where a number below 1 is a share of the run",
    "group_by_length": "it is train_sampling_strategy: group_by_length now",
    "max_seq_length": "it is max_length now",
    "max_prompt_length": "TRL dropped it; max_length cuts prompt and completion together",
    "max_completion_length": "TRL dropped it; max_length cuts prompt and completion together",
    "per_gpu_train_batch_size": "it is per_device_train_batch_size",
    "torch_dtype": "it is dtype, under model",
    "no_cuda": "hardware never enters a recipe; use accelerate launch --cpu",
    "rpo_alpha": "it is loss_type: [sigmoid, sft] with loss_weights now",
    "reference_free": "TRL dropped it, and a DPO stage always has its reference",
    "force_use_ref_model": "the reference is the start of the stage; no second model is loaded",
    "model_adapter_name": "the toolkit names the adapters",
    "ref_adapter_name": "the toolkit names the adapters",
    "label_pad_token_id": "the toolkit prepares the data itself",
    "generate_during_eval": "use the evaluate section",
    "dataset_batch_size": "TRL dropped it",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR in the environment",
    "save_safetensors": "transformers 5 always saves safetensors",
    "epochs": "it is num_train_epochs",
    "batch_size": "it is per_device_train_batch_size",
    "lr": "it is learning_rate",
    "scheduler": "it is lr_scheduler_type",
    "lora_r": "it is r, under lora",
    "lora_target_modules": "it is target_modules, under lora",
    "load_in_4_bit": "it is load_in_4bit, under quantization",
}
