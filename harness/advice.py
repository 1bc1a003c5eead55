"""What a user may not expect of a configuration on this machine, in a line each."""
from harness.flops import train_flops
from harness.machine import matmul_rate

DAY_S = 86_400
SLOWEST_FLOPS = 5e9  # FLOP/s of every CPU: a recipe of less than a day at this needs no estimate
CPU_SHARE = 0.5  # of the matrix-product rate in training (results/throughput_cpu.csv: 46 and 62 %)


def advice(config, device, num_images):
    """Lines on what a user may not expect of this TrainConfig and so many training images."""
    lines = []
    if not config.total_steps:
        return lines
    if config.batch_size > num_images:
        lines.append(f"batch_size {config.batch_size:,} is above the set's {num_images:,} training "
                     "images: each of them is in every batch, some of them more often")
    if device.type != "cpu":
        return lines
    if config.precision == "bfloat16":
        lines.append("precision bfloat16 is slower than float32 on a CPU (--precision float32 is "
                     "another run)")
    flops = train_flops(config)
    if flops < DAY_S * SLOWEST_FLOPS:
        return lines
    days = flops / (CPU_SHARE * matmul_rate()) / DAY_S
    if days > 1:
        size = f"{config.total_steps:,} steps of {config.batch_size:,} images, {flops:.2g} FLOPs"
        digits = 0 if days >= 10 else 1
        lines.append(f"this recipe takes about {days:,.{digits}f} days on this CPU ({size}): fewer "
                     "--total_steps or a smaller --model.num_couplings make it shorter, a GPU "
                     "faster")
    return lines
