"""`tinyonn life-demo`."""

from .demo.life import life_demo as life_demo
