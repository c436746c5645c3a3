"""What both sides of sevattest share; imports none of the other four packages."""
