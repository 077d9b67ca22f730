def page(*a):
    return []


def draw_figure(*a):
    pass
