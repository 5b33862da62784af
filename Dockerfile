# docker build -t maskdit .
# docker run --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD/results:/maskdit/results" -v /path/to/data:/data maskdit \
#     python3 train_latent.py --config configs/train/maskdit-latent-imagenet.yaml --num_process_per_node 8 data.root=/data
FROM pytorch/pytorch:2.7.1-cuda12.8-cudnn9-runtime

# Triton compiles its kernel launchers with the C compiler, which the runtime image lacks.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

# The base's torch and torchvision fit its CUDA: as constraints, they are not replaced.
COPY requirements.txt /tmp/requirements.txt
RUN python -c "from importlib.metadata import version; [print(f'{name}=={version(name)}') for name in ('torch', 'torchvision')]" > /tmp/base.txt \
    && python -m pip install --no-cache-dir -r /tmp/requirements.txt -c /tmp/base.txt

# A home and assets/ that anyone may write to, and a name for the home: with --user any id works, also one without an entry in /etc/passwd.
RUN useradd --create-home maskdit && chmod 777 /home/maskdit && install -d -m 777 -o maskdit /maskdit
ENV HOME=/home/maskdit LOGNAME=maskdit PYTHONUNBUFFERED=1 MASKDIT_PYTHON=python3
WORKDIR /maskdit
COPY --chown=maskdit . .
RUN find assets -type d -exec chmod 777 {} +
USER maskdit
CMD ["bash", "scripts/demo.sh"]
