"""Start the recipe as a SageMaker training job, with SDK v3 (`pip install "sagemaker>=3"`).

    python launch.py --role arn:aws:iam::111122223333:role/Trainer --data s3://bucket/samsum/ --image <training image>

The image is one with PyTorch, such as the PyTorch or Hugging Face training containers of AWS.
"""

from __future__ import annotations

import argparse
from pathlib import Path

#: The flags of `lora-plugins train`; what is not here stands at the recipe's value.
HYPERPARAMETERS = {
    "model": "bigscience/bloomz-7b1",
    "chunk_length": 1536,
    "num_train_epochs": 3,
    "learning_rate": 2e-4,
    "r": 8,
    "quantization": "int8",
    "merge": "fp16",
    "save_strategy": "steps",
    "save_steps": 200,
}


def main() -> None:
    """Read the command line and start the job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", required=True, help="ARN of the role that the job runs as")
    parser.add_argument("--data", required=True, help="S3 folder of the training data: JSONL, CSV or Parquet files")
    parser.add_argument("--image", required=True, help="URI of a training image with PyTorch")
    parser.add_argument("--instance", default="ml.g5.2xlarge", help="instance type; one A10G by default")
    parser.add_argument("--checkpoints", help="S3 folder for checkpoints; makes it a spot job")
    arguments = parser.parse_args()

    from sagemaker.core.training.configs import (
        CheckpointConfig,
        Compute,
        InputData,
        SourceCode,
        StoppingCondition,
    )
    from sagemaker.train import ModelTrainer

    spot = arguments.checkpoints is not None
    day = 24 * 3600
    trainer = ModelTrainer(
        training_image=arguments.image,
        role=arguments.role,
        base_job_name="lora-plugins",
        source_code=SourceCode(
            source_dir=str(Path(__file__).parent), entry_script="train.py", requirements="requirements.txt"
        ),
        compute=Compute(
            instance_type=arguments.instance,
            instance_count=1,
            volume_size_in_gb=200,
            enable_managed_spot_training=spot,
        ),
        stopping_condition=StoppingCondition(
            max_runtime_in_seconds=day, max_wait_time_in_seconds=2 * day if spot else None
        ),
        checkpoint_config=CheckpointConfig(s3_uri=arguments.checkpoints) if spot else None,
        hyperparameters=HYPERPARAMETERS,
    )
    trainer.train(input_data_config=[InputData(channel_name="training", data_source=arguments.data)])


if __name__ == "__main__":
    main()
