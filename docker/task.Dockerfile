# syntax=docker/dockerfile:1
# A task of your own in an image: from the directory of its package, which has a pyproject.toml with the entry point
# (README, "A task of your own"):
#
#   docker build -f …/docker/task.Dockerfile -t hospital-party .
#
# What else the package needs is installed with it. The task is then known by its name, as in `sotto jobs submit --task`.

ARG BASE=sotto-party
FROM ${BASE}
USER 0:0
COPY . /task
RUN pip --python /opt/sotto/bin/python install --no-cache-dir /task && \
    python -c "from importlib.metadata import entry_points; assert len(entry_points(group='sotto.tasks')) > 1" && \
    rm -r /task
USER 10001:10001
