# flashar-pl on a CPU, with the versions that the tests last passed with.
#
#   docker build -t flashar-pl .
#   alias flashar='docker run --rm --user "$(id -u)" -v flashar:/state -v "$PWD:/work" flashar-pl'
#   flashar demo
#   flashar generate --checkpoint runs/demo/flashar/checkpoints/last.ckpt --classes 3,7 --out drawn
#
# /work is the directory that commands read and write. /state keeps the key by which a command knows the runs of an earlier one
# for yours: without the volume every container is a stranger to the last one's runs.
FROM python:3.11-slim

COPY pyproject.toml constraints.txt README.md LICENSE /opt/flashar-pl/
COPY experiments /opt/flashar-pl/experiments
COPY flashar_pl /opt/flashar-pl/flashar_pl
# torch's own index has wheels without CUDA, which are a tenth of the size
RUN pip install --no-cache-dir --constraint /opt/flashar-pl/constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu '/opt/flashar-pl[demo]' \
    && rm -r /opt/flashar-pl

ENV HOME=/tmp XDG_STATE_HOME=/state OMP_NUM_THREADS=1
# open to every user of --user; a new volume takes this over
RUN useradd --no-create-home flashar && install --directory --owner flashar --mode 1777 /work /state
USER flashar
WORKDIR /work
ENTRYPOINT ["flashar"]
CMD ["--help"]
