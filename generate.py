"""Generate text from a trained model; see megatron/cli/generate.py."""

from megatron.common.interpreter import run_command

if __name__ == "__main__":
    run_command("megatron.cli.generate")
