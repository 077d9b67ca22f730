"""`tinyonn arc-demo`."""

from .demo.arc import arc_demo as arc_demo
