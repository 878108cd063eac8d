"""How fast a step is: `cmt-mae bench`, the count of its multiplications and the share of each part."""
