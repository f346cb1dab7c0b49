"""python -m utils.download"""
from utils.download.command import main
from utils.errors import run

run(main)
