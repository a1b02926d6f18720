# ARGS goes on to the command: make run_training ARGS="--epochs 1 --device cpu"
.PHONY: install_all run_training test

install_all:
	bash setup.sh --dev
run_training:
	bash train.sh $(ARGS)
test:
	bash test.sh $(ARGS)
