"""What other trainers call our keys: sd-scripts, diffusers' examples, ai-toolkit, SimpleTuner and
OneTrainer. A config that was moved here is told the right names."""

from __future__ import annotations

from collections.abc import Mapping

# our section.key: the names that others have for it
NAMES_BY_PATH = {
    "output_dir": "output_name training_folder workspace_dir output_model_destination save_root",
    "model": "model_config",
    "model.family": "model_family model_type arch",
    "model.pretrained_model_name_or_path": "base_model_name name_or_path base_model",
    "model.max_sequence_length": "t5xxl_max_token_length tokenizer_max_length",
    "model.clip_chunks": "max_token_length max_clip_token_length",
    "model.quantization": "base_model_precision fp8_base quantize weight_dtype",
    "model.offload": "blocks_to_swap layer_offload_fraction",
    "lora": "network adapter peft",
    "lora.rank": "network_dim lora_rank linear dim r",
    "lora.type": "algo peft_type lora_type network_type",
    "lora.decompose_factor": "lokr_factor factor",
    "lora.alpha": "network_alpha lora_alpha linear_alpha",
    "lora.dropout": "network_dropout lora_dropout",
    "lora.init_from": "network_weights pretrained_lora_path lora_model_name init_lora",
    "lora.target_modules": "lora_layers layer_filter only_if_contains",
    "lora.use_dora": "lora_decompose weight_decompose dora",
    "data": "datasets dataset",
    "data.concepts": "data_backend_config subsets",
    "data.instance_data_dir": "train_data_dir folder_path instance_data_root concept_file_name "
    "image_folder data_dir instance_images_dir",
    "data.class_data_dir": "reg_data_dir class_images_dir",
    "data.num_class_images": "with_prior_preservation",
    "data.instance_prompt": "class_tokens default_caption",
    "data.trigger": "trigger_word trigger_phrase id_token placeholder_token",
    "data.caption_lines": "enable_wildcard disable_multiline_split",
    "data.caption_prefix": "prepend_instance_prompt",
    "data.shuffle_tags": "shuffle_caption shuffle_tokens caption_shuffle enable_tag_shuffling",
    "data.keep_tags": "keep_tokens keep_tags_count",
    "data.tag_dropout": "caption_tag_dropout_rate token_dropout_rate tag_dropout_probability",
    "data.caption_dropout": "caption_dropout_rate proportion_empty_prompts",
    "data.mask_dir": "mask_path conditioning_data_dir",
    "data.use_alpha_mask": "alpha_mask",
    "data.mask_floor": "mask_min_value unmasked_weight",
    "data.random_flip": "flip_aug flip_x enable_random_flip",
    "data.center_crop": "random_crop crop_style",
    "data.cache": "cache_latents cache_latents_to_disk latent_caching",
    "data.cache_dir": "cache_dir_vae cache_dir_text",
    "objective": "noise_scheduler",
    "objective.snr_gamma": "min_snr_gamma",
    "objective.debiased": "debiased_estimation_loss",
    "objective.noise_offset": "offset_noise_weight",
    "objective.density": "weighting_scheme timestep_sampling timestep_type timestep_distribution",
    "objective.shift": "discrete_flow_shift flow_schedule_shift timestep_shift",
    "optimizer.name": "optimizer_type use_8bit_adam",
    "optimizer.learning_rate": "lr unet_lr transformer_lr base_lr",
    "optimizer.text_encoder_lr": "text_encoder_learning_rate te_lr",
    "optimizer.lora_plus_ratio": "loraplus_lr_ratio loraplus_unet_lr_ratio",
    "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optimizer.weight_decay": "adam_weight_decay",
    "optimizer.eps": "adam_epsilon",
    "optimizer.lr_scheduler": "learning_rate_scheduler scheduler",
    "optimizer.lr_warmup_steps": "learning_rate_warmup_steps warmup_steps",
    "optimizer.lr_num_cycles": "lr_scheduler_num_cycles learning_rate_cycles",
    "optimizer.lr_power": "lr_scheduler_power",
    "train.max_train_steps": "steps num_train_epochs max_train_epochs epochs",
    "train.train_batch_size": "batch_size",
    "train.gradient_accumulation_steps": "gradient_accumulation",
    "train.mixed_precision": "train_dtype dtype full_bf16 full_fp16",
    "train.max_grad_norm": "clip_grad_norm gradient_clip_val",
    "train.ema_decay": "ema use_ema ema_config",
    "train.memory": "low_vram lowram highvram",
    "train.attention": "sdpa xformers mem_eff_attn attention_mechanism",
    "checkpoint": "save",
    "checkpoint.checkpointing_steps": "save_every_n_steps save_every checkpoint_step_interval",
    "checkpoint.checkpoints_total_limit": "max_step_saves_to_keep save_last_n_steps",
    "checkpoint.resume_from_checkpoint": "resume resume_from",
    "validation": "sample",
    "validation.validation_steps": "sample_every sample_every_n_steps validation_epochs",
    "validation.prompts": "validation_prompt sample_prompts samples",
    "validation.negative_prompt": "neg validation_negative_prompt",
    "validation.num_images": "num_validation_images",
    "validation.num_inference_steps": "sample_steps validation_num_inference_steps",
    "validation.guidance_scale": "validation_guidance",
    "tracking": "logging",
    "tracking.report_to": "log_with use_wandb",
    "hub.hub_model_id": "huggingface_repo_id hf_repo_id",
    "hub.private": "hf_private model_card_private",
}

# What `accelerate launch` is told, by a flag or by its own YAML file.
LAUNCHER_FLAGS = {
    "num_processes": "--num_processes N",
    "num_machines": "--num_machines N",
    "gpu_ids": "--gpu_ids 0,1",
    "device": "--gpu_ids 0",
}


def invert(names_by_path: Mapping[str, str]) -> dict[str, str]:
    """Another trainer's name: our section.key."""
    paths = {}
    for path, names in names_by_path.items():
        for name in names.split():
            paths[name] = path
    return paths


PATHS_BY_NAME = invert(NAMES_BY_PATH)
