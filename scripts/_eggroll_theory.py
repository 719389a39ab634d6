"""placeholder"""
def theory_points(out, quick): return {}
def table(points): return ""
