# ARGS goes on to the command: make run_training ARGS="--epochs 1 --device cpu"
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python)
.PHONY: install_all run_annotation run_training test

install_all:
	bash setup.sh --dev
run_annotation:
	$(PYTHON) annotate.py $(ARGS)
run_training:
	bash train.sh $(ARGS)
test:
	bash test.sh $(ARGS)
