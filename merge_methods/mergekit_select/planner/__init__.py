"""What would mergekit do? Plans of merges, their execution tensor by tensor, and all of mergekit's private parts.

No other room imports a name of mergekit's that begins with an underscore, touches what mergekit keeps for a whole
process, or works around a quirk of its planner.
"""

import mergekit_select.methods  # noqa: F401  # registers the two methods, for where the startup file has not
